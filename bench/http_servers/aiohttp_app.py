"""The test application on aiohttp's low-level server: one handler, no router, no middleware, its leanest form."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from bench.http_servers.workload import (
    BODY_LIMIT_BYTES,
    FLOOD_CHUNK,
    FLOOD_CHUNKS_MAX,
    SLOW_CHUNKS,
    SSE_HEADERS,
    TOO_LARGE,
    Observations,
    StreamSource,
    StreamSpec,
    json_answer,
    sse_chunk,
)


class AiohttpApp:
    """Routes by exact path. The server must be made with `handler_cancellation=True`: a gone client cancels the handler."""

    def __init__(self) -> None:
        self._source = StreamSource()
        self._seen = Observations()
        self._routes: dict[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            "/echo": self._echo,
            "/stream": self._stream,
            "/hold": self._hold,
            "/limited": self._limited,
            "/flood": self._flood,
            "/slow": self._slow,
            "/stats": self._stats,
        }

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request."""
        return await self._routes[request.path](request)

    async def _echo(self, request: web.BaseRequest) -> web.StreamResponse:
        return _json_response(200, json_answer(await request.read()))

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        queue = self._source.open(StreamSpec.from_query(request.query_string.encode()))
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        while (chunk := await queue.get()) is not None:
            await response.write(chunk)
        await response.write_eof()
        return response

    async def _hold(self, request: web.BaseRequest) -> web.StreamResponse:
        """Hold the stream open, silent or with a chunk every 10 ms, until cancelled or refused by the transport."""
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        try:
            while True:
                await response.write(sse_chunk(0))
                await asyncio.sleep(0.01 if request.query_string == "busy" else 30)
        finally:
            self._seen.note_disconnect()

    async def _limited(self, request: web.BaseRequest) -> web.StreamResponse:
        """Refuse a body over the limit: by its declared length before reading any of it, otherwise while reading."""
        self._seen.body_bytes = 0
        if (request.content_length or 0) > BODY_LIMIT_BYTES:
            return _json_response(413, TOO_LARGE, close=True)
        async for piece in request.content.iter_any():
            self._seen.body_bytes += len(piece)
            if self._seen.body_bytes > BODY_LIMIT_BYTES:
                return _json_response(413, TOO_LARGE, close=True)
        return _json_response(200, b"{}")

    async def _flood(self, request: web.BaseRequest) -> web.StreamResponse:
        self._seen.flood_bytes = 0
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        try:
            for _ in range(FLOOD_CHUNKS_MAX):
                await response.write(FLOOD_CHUNK)
                self._seen.note_flood()
            self._seen.flood_ended_by = "end of the flood"
        except asyncio.CancelledError:
            self._seen.flood_ended_by = "cancellation"
            raise
        except OSError as error:
            self._seen.flood_ended_by = f"{type(error).__name__} from write"
            raise
        return response

    async def _slow(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        for _ in range(SLOW_CHUNKS):
            await response.write(sse_chunk(0))
            await asyncio.sleep(0.1)
        await response.write_eof()
        return response

    async def _stats(self, request: web.BaseRequest) -> web.StreamResponse:
        return _json_response(200, self._seen.stats(self._source))


def _json_response(status: int, body: bytes, *, close: bool = False) -> web.Response:
    response = web.Response(status=status, body=body, content_type="application/json")
    if close:
        response.force_close()
    return response
