"""Ollama's paths. Part of the shell; shapes stand in ollama.py and ollama_answers.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

import orjson

from headrace.errors import NotFoundError
from services.router.generation import Engine, ModelOffer
from services.router.http import ollama, ollama_answers, serving
from services.router.http.exchange import Exchange
from services.router.http.ollama_answers import Clock, OllamaAnswer
from services.router.http.routing import Route

_CLOCK = Clock(time.monotonic_ns, time.time_ns)


class OllamaRoutes:
    """/api/chat and what belongs to it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        shape = ollama_answers.error_object
        return [
            Route("/api/chat", {"POST": self._chat}, shape),
            Route("/api/generate", {"POST": self._generate}, shape),
            Route("/api/show", {"POST": self._show}, shape),
            Route("/api/tags", {"GET": self._tags}, shape),
            Route("/api/ps", {"GET": self._running}, shape),
            Route("/api/version", {"GET": self._version}, shape),
        ]

    async def _chat(self, exchange: Exchange) -> None:
        await self._answer(exchange, ollama.parse_chat, is_chat=True)

    async def _generate(self, exchange: Exchange) -> None:
        await self._answer(exchange, ollama.parse_generate, is_chat=False)

    async def _answer(self, exchange: Exchange, parse: Callable[[bytes], ollama.OllamaCall], *, is_chat: bool) -> None:
        asked = parse(await exchange.read_body())
        if asked.generation is None:
            answer = OllamaAnswer(model=self._offer(asked.model).name, is_chat=is_chat, clock=_CLOCK)
            await exchange.respond(200, answer.loaded())
            return
        stream = serving.open_stream(exchange, self._engine, asked.generation, user=None, is_streaming=asked.is_streaming)
        answer = OllamaAnswer(model=stream.model, is_chat=is_chat, clock=_CLOCK)
        await serving.send_answer(exchange, stream, answer, is_streaming=asked.is_streaming)

    async def _show(self, exchange: Exchange) -> None:
        name = ollama.parse_show(await exchange.read_body())
        await exchange.respond(200, ollama_answers.show(self._offer(name)))

    def _offer(self, name: str) -> ModelOffer:
        for offer in self._engine.list_models():
            if offer.name == name:
                return offer
        raise NotFoundError(f"the model {name[:200]!r} does not exist or is not served now", param="model")

    async def _tags(self, exchange: Exchange) -> None:
        await exchange.respond(200, ollama_answers.tags(self._engine.list_models()))

    async def _running(self, exchange: Exchange) -> None:
        await exchange.respond(200, ollama_answers.running(self._engine.list_models()))

    async def _version(self, exchange: Exchange) -> None:
        await exchange.respond(200, orjson.dumps({"version": version("headrace")}))
