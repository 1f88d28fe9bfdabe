"""The glue between our ASGI application and uvicorn, run inside our own event loop on a socket we bind. Nothing else knows uvicorn.

Beyond uvicorn's own behaviour: bounds on size and time of a request's head, errors of the HTTP parser in OpenAI's shape, a limit on
connections that never send a request, and a way for the application to break a connection that is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from headrace.errors import ConfigError, InvalidRequestError
from services.router.http.app import HttpApp
from services.router.http.exchange import CUT_EXTENSION
from services.router.http.openai_answers import error_object

MAX_HEAD_BYTES = 64 * 1024
BACKLOG = 2048
GRACE_S = 2
START_TIMEOUT_S = 10.0
_DATE_INTERVAL_S = 1.0


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with our bounds."""

    _head_bytes = 0
    _head_deadline: asyncio.TimerHandle | None = None
    """While bytes have come that are no whole head yet, and no answer is under way."""

    def __init__(self, *args: Any, head_timeout_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head_timeout_s = head_timeout_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's by duck type only.
        super().connection_made(cast(asyncio.Transport, transport))
        # The first byte of a request disarms it, as between requests.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Bytes end the wait for a request; from the first of them on its head has a time, however many more trickle in."""
        super().data_received(data)
        # None before the first request, which uvicorn's types leave out.
        cycle: Any = self.cycle
        is_idle = cycle is None or cycle.response_complete
        if is_idle and self._head_deadline is None and not self.transport.is_closing():
            self._head_deadline = self.loop.call_later(self._head_timeout_s, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _end_head(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self.scope["extensions"] = {CUT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            # httptools reports it as an error of the parser, which `send_400_response` answers.
            raise httptools.HttpParserError(f"the head is over {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, in our error shape."""
        if self._head_bytes > MAX_HEAD_BYTES:
            msg = f"the head of the request must be at most {MAX_HEAD_BYTES} bytes"
        body = orjson.dumps(error_object(InvalidRequestError(msg)))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._is_started = asyncio.Event()
        self._is_ending = asyncio.Event()

    def end(self) -> None:
        """Take no more connections; `serve` returns when answers under way have ended, or had their time."""
        self.should_exit = True
        self._is_ending.set()

    async def main_loop(self) -> None:
        """Once a second the time in the head of answers is set; uvicorn's own loop also looks ten times whether it is to end."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DATE_INTERVAL_S):
                    await self._is_ending.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: signals belong to the process's runner."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self._is_started.set()

    async def wait_started(self, serving: asyncio.Task[None]) -> None:
        """Wait until connections are taken; a failing start raises its error."""
        started = asyncio.create_task(self._is_started.wait())
        await asyncio.wait((started, serving), timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if serving.done():
            serving.result()


class HttpServer:
    """The HTTP port."""

    def __init__(self, app: HttpApp, *, host: str, port: int, keep_alive_s: float, head_timeout_s: float) -> None:
        self.port = port
        self._host = host
        config = uvicorn.Config(
            app,
            # uvicorn calls it, and asks for nothing else of a class.
            http=cast("type[asyncio.Protocol]", partial(_Protocol, head_timeout_s=head_timeout_s)),
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=math.ceil(keep_alive_s),
            timeout_graceful_shutdown=GRACE_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and listen.

        Raises:
            ConfigError: The port cannot be bound; it names the setting.
        """
        listener = listen(self._host, self.port, setting="router.http_port")
        self.port = listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-server")
        await self._server.wait_started(self._task)

    async def stop(self) -> None:
        """Close the port; answers under way get a moment to end."""
        if self._task is not None:
            self._server.end()
            await self._task


def listen(host: str, port: int, *, setting: str) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ConfigError: It cannot be bound; the message names the port and its setting.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else str(error)
        raise ConfigError(
            f"port {port} on {host} cannot be bound ({reason}): stop what uses it, or set {setting} to another"
        ) from error
    listener.setblocking(False)
    return listener
