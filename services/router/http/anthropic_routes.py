"""Anthropic's paths. Part of the shell; shapes stand in anthropic.py and anthropic_answers.py."""

from __future__ import annotations

from services.router.generation import Engine
from services.router.http import anthropic, anthropic_answers, serving
from services.router.http.exchange import Exchange, unless_disconnected
from services.router.http.routing import Route


class AnthropicRoutes:
    """POST /v1/messages and what belongs to it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        shape = anthropic_answers.error_object
        return [
            Route("/v1/messages", {"POST": self._create}, shape),
            Route("/v1/messages/count_tokens", {"POST": self._count_tokens}, shape),
        ]

    async def _create(self, exchange: Exchange) -> None:
        anthropic.check_version(exchange.headers.get("anthropic-version"))
        asked = anthropic.parse_messages(await exchange.read_body())
        stream = serving.open_stream(exchange, self._engine, asked.generation, user=asked.user, is_streaming=asked.is_streaming)
        answer = anthropic_answers.MessageAnswer(
            exchange.open_call.request_id, model=stream.model, stop_sequences=asked.stop_sequences
        )
        await serving.send_answer(exchange, stream, answer, is_streaming=asked.is_streaming)

    async def _count_tokens(self, exchange: Exchange) -> None:
        anthropic.check_version(exchange.headers.get("anthropic-version"))
        model, prompt = anthropic.parse_count_tokens(await exchange.read_body())
        encoded = await unless_disconnected(exchange, self._engine.tokenize(model, prompt, exchange.open_call))
        await exchange.respond(200, anthropic_answers.token_count(int(encoded.token_ids.size)))
