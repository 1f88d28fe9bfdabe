"""One candidate server in a process of its own: `python -m bench.http_servers.server NAME`.

Each runs inside an event loop that we create (uvloop) with signal handlers that we install, because that is what the router
needs. The port is printed as the first line of stdout. SIGTERM asks for the candidate's own graceful stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
import uvloop
from aiohttp import web
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server as GranianServer

from bench.http_servers.aiohttp_app import AiohttpApp
from bench.http_servers.asgi_app import AsgiApp

DRAIN_DEADLINE_S = 10


class _UvicornServer(uvicorn.Server):
    """Uvicorn without its signal handlers; the process's owner decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    return listener


async def _run_uvicorn(stop: asyncio.Event) -> None:
    listener = _bind()
    config = uvicorn.Config(
        AsgiApp(), http="httptools", ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_DEADLINE_S,
    )  # fmt: skip
    server = _UvicornServer(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _announce(listener.getsockname()[1])
    await stop.wait()
    server.should_exit = True
    await serving


async def _run_granian(stop: asyncio.Event) -> None:
    # The embedded server takes an address, not a socket: find a free port, give it up again, and hope.
    with _bind() as probe:
        port = probe.getsockname()[1]
    server = GranianServer(
        AsgiApp(), address="127.0.0.1", port=port, interface=Interfaces.ASGINL, http=HTTPModes.http1, websockets=False,
        log_enabled=False,
    )  # fmt: skip
    serving = asyncio.create_task(server.serve())
    _announce(port)
    await stop.wait()
    server.stop()  # type: ignore[no-untyped-call]
    await serving


async def _run_aiohttp(stop: asyncio.Event) -> None:
    listener = _bind()
    low_level = web.Server(AiohttpApp(), handler_cancellation=True, access_log=None)
    runner = web.ServerRunner(low_level, shutdown_timeout=DRAIN_DEADLINE_S)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    _announce(listener.getsockname()[1])
    await stop.wait()
    await runner.cleanup()


CANDIDATES: dict[str, Callable[[asyncio.Event], Awaitable[None]]] = {
    "uvicorn": _run_uvicorn,
    "granian": _run_granian,
    "aiohttp": _run_aiohttp,
}


def _announce(port: int) -> None:
    print(port, flush=True)


async def _serve(name: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await CANDIDATES[name](stop)


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
