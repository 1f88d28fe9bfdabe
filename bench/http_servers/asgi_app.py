"""The test application as a raw ASGI callable: the form in which the router would be written for uvicorn or granian."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

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

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_SSE_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(name.encode(), value.encode()) for name, value in SSE_HEADERS.items()],
}


class AsgiApp:
    """Routes by exact path; each handler speaks ASGI messages itself."""

    def __init__(self) -> None:
        self._source = StreamSource()
        self._seen = Observations()
        self._routes: dict[str, Callable[[Scope, Receive, Send], Awaitable[None]]] = {
            "/echo": self._echo,
            "/stream": self._stream,
            "/hold": self._hold,
            "/limited": self._limited,
            "/flood": self._flood,
            "/slow": self._slow,
            "/stats": self._stats,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            await self._routes[scope["path"]](scope, receive, send)

    async def _echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        body: bytes = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        await _send_json(send, 200, json_answer(body))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        queue = self._source.open(StreamSpec.from_query(scope["query_string"]))
        await send(_SSE_START)
        while (chunk := await queue.get()) is not None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _hold(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the stream open, silent or with a chunk every 10 ms, until the server says that the client is gone."""
        await send(_SSE_START)
        await send({"type": "http.response.body", "body": sse_chunk(0), "more_body": True})
        watcher = asyncio.create_task(_until_disconnect(receive))
        while not watcher.done():
            await asyncio.wait([watcher], timeout=0.01 if scope["query_string"] == b"busy" else 30)
            if not watcher.done():
                await send({"type": "http.response.body", "body": sse_chunk(0), "more_body": True})
        self._seen.note_disconnect()

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a body over the limit: by its declared length before reading any of it, otherwise while reading."""
        self._seen.body_bytes = 0
        declared = int(dict(scope["headers"]).get(b"content-length", b"0"))
        if declared > BODY_LIMIT_BYTES:
            await _send_json(send, 413, TOO_LARGE, close=True)
            return
        more_body = True
        while more_body:
            message = await receive()
            self._seen.body_bytes += len(message.get("body", b""))
            more_body = message.get("more_body", False)
            if self._seen.body_bytes > BODY_LIMIT_BYTES:
                await _send_json(send, 413, TOO_LARGE, close=True)
                return
        await _send_json(send, 200, b"{}")

    async def _flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._seen.flood_bytes = 0
        await send(_SSE_START)
        watcher = asyncio.create_task(_until_disconnect(receive))
        try:
            for _ in range(FLOOD_CHUNKS_MAX):
                await send({"type": "http.response.body", "body": FLOOD_CHUNK, "more_body": True})
                self._seen.note_flood()
                if watcher.done():
                    self._seen.flood_ended_by = "disconnect message"
                    return
            self._seen.flood_ended_by = "end of the flood"
        except OSError as error:
            self._seen.flood_ended_by = f"{type(error).__name__} from send"
        finally:
            watcher.cancel()

    async def _slow(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(_SSE_START)
        for _ in range(SLOW_CHUNKS):
            await send({"type": "http.response.body", "body": sse_chunk(0), "more_body": True})
            await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stats(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send_json(send, 200, self._seen.stats(self._source))


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(send: Send, status: int, body: bytes, *, close: bool = False) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
