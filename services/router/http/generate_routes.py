"""POST /generate. Part of the shell; shapes stand in generate.py and generate_answers.py."""

from __future__ import annotations

import time

from services.router.generation import Engine
from services.router.http import generate, serving
from services.router.http.exchange import Exchange
from services.router.http.generate_answers import GenerateAnswer
from services.router.http.merged_stream import MergedStream
from services.router.http.routing import Route

PATH = "/generate"


class GenerateRoutes:
    """The native path, as SGLang has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        return [Route(PATH, {"POST": self._generate})]

    async def _generate(self, exchange: Exchange) -> None:
        asked = generate.parse_generate(await exchange.read_body())
        exchange.open_call.is_streaming = asked.is_streaming
        generations = [prompt.generation for prompt in asked.prompts]
        stream = MergedStream(exchange, self._engine, generations, user=None, endpoint=PATH)
        began_s = time.monotonic()
        answer = GenerateAnswer(
            asked, exchange.open_call.request_id, usage_of=stream.usage_of, elapsed_s=lambda: time.monotonic() - began_s
        )
        await serving.send_answer(exchange, stream, answer, is_streaming=asked.is_streaming)
