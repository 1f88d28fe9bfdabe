"""A fake OpenAI server that streams at once: for tests of the client, and to learn what the client alone costs.

The model's name says how it behaves, so one server plays every part. A word counts as one token, and each prompt has
`num_template_tokens` more. Run alone it serves on an ephemeral port: `python -m bench.serve.fake_server`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import web

_SSE = {"content-type": "text/event-stream"}


class FakeOpenAI:
    """Answers both generating endpoints; keeps every request body it was sent.

    Models: `ok`; `no-usage` (sends no counts); `pairs` (two tokens a chunk); `stops` (ends after one token); `cached` (reports
    cached tokens); `busy` (429); `half` (every second request gets 429); `page` (a 500 that is no JSON); `errors` (an error object
    in mid-stream); `garbage` (a chunk that is no JSON); `truncated` (no [DONE]); `cut` (the connection is dropped in mid-stream);
    `mute` (a first chunk, then nothing, ever).
    """

    def __init__(self, *, num_template_tokens: int = 1, sends_done: bool = True) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.num_open = 0
        self.num_open_max = 0
        self._num_template_tokens = num_template_tokens
        self._sends_done = sends_done

    def application(self) -> web.Application:
        """The aiohttp application to serve."""
        application = web.Application(client_max_size=64 << 20)
        application.router.add_post("/v1/completions", self._generate)
        application.router.add_post("/v1/chat/completions", self._generate)
        return application

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("authorization"))
        model = body["model"]
        if model == "busy" or (model == "half" and len(self.bodies) % 2 == 0):
            return web.Response(status=429, body=orjson.dumps({"error": {"message": "queue is full", "code": "overloaded"}}))
        if model == "page":
            return web.Response(status=500, text="<html>Internal Server Error</html>")
        self.num_open += 1
        self.num_open_max = max(self.num_open_max, self.num_open)
        try:
            return await self._stream(request, body, model)
        finally:
            self.num_open -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], model: str) -> web.StreamResponse:
        is_chat = "messages" in body
        response = web.StreamResponse(headers=_SSE)
        await response.prepare(request)
        if is_chat:
            await _write(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        num_tokens = 1 if model == "stops" else body["max_tokens"]
        num_tokens_a_chunk = 2 if model == "pairs" else 1
        for first in range(0, num_tokens, num_tokens_a_chunk):
            if first and model in ("errors", "garbage", "truncated", "cut", "mute"):
                return await _misbehave(response, request, model)
            text = " word" * min(num_tokens_a_chunk, num_tokens - first)
            await _write(
                response, {"choices": [{"index": 0, "delta": {"content": text}} if is_chat else {"index": 0, "text": text}]}
            )
            await asyncio.sleep(0)
        reason = "stop" if model == "stops" else "length"
        await _write(response, {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": reason}]})
        if model != "no-usage":
            await _write(response, {"choices": [], "usage": self._usage(body, num_tokens)})
        if self._sends_done:
            await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self, body: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        text = body.get("prompt") or " ".join(message["content"] for message in body["messages"])
        num_prompt_tokens = len(text.split()) + self._num_template_tokens
        usage: dict[str, Any] = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens}
        if body["model"] == "cached":
            usage["prompt_tokens_details"] = {"cached_tokens": num_prompt_tokens - 1}
        return usage


async def _write(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: %b\n\n" % orjson.dumps(chunk))


async def _misbehave(response: web.StreamResponse, request: web.Request, model: str) -> web.StreamResponse:
    match model:
        case "errors":
            await _write(response, {"error": {"message": "worker lost", "code": "replica_dead"}})
            await response.write(b"data: [DONE]\n\n")
        case "garbage":
            await response.write(b"data: {not json\n\n")
        case "cut":
            assert request.transport is not None
            request.transport.abort()
        case "mute":
            await asyncio.Event().wait()
    return response


async def _serve() -> None:
    runner = web.AppRunner(FakeOpenAI().application(), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
