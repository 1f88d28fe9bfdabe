"""The load side: raw sockets under asyncio, so that the client costs little beside the server it measures.

It knows just enough HTTP/1.1 to count answers and events; the figures that matter (CPU time, wall time of a stream run) are
taken in the server process and fetched from `/stats`.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import time
from functools import partial
from typing import Any, cast

import orjson

from bench.http_servers.workload import ANSWER_BYTES

_SENT_AT = re.compile(rb'data: \{"t":(\d+)')
_BODY = orjson.dumps({"model": "m", "prompt": "p" * 226})
_ECHO = b"POST /echo HTTP/1.1\r\nhost: b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


class _EchoConnection(asyncio.Protocol):
    """Sends the next request as soon as the last answer is complete, until the shared budget is spent."""

    def __init__(self, budget: list[int], done: asyncio.Future[None]) -> None:
        self._budget = budget
        self._done = done
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end >= 0 and len(self._received) >= head_end + 4 + ANSWER_BYTES:
            if not self._received.startswith(b"HTTP/1.1 200"):
                self._done.set_exception(RuntimeError(f"echo failed: {self._received[:80]!r}"))
                return
            self._received = b""
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or ConnectionError("the server closed a connection that was in use"))

    def _next(self) -> None:
        assert self._transport is not None
        if self._budget[0] == 0:
            if not self._done.done():
                self._done.set_result(None)
            self._transport.close()
            return
        self._budget[0] -= 1
        self._transport.write(_ECHO)


class _StreamConnection(asyncio.Protocol):
    """Counts events until the stream's end; keeps how old each was on arrival."""

    def __init__(self, target: str, done: asyncio.Future[None], delays_ns: list[int]) -> None:
        self._target = target
        self._done = done
        self._delays_ns = delays_ns
        self._tail = b""
        self._transport: asyncio.Transport | None = None
        self.num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(f"GET {self._target} HTTP/1.1\r\nhost: b\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        now_ns = time.monotonic_ns()
        pending = self._tail + data
        *events, self._tail = pending.split(b"}}]}\n\n")
        self.num_events += len(events)
        for event in events:
            if match := _SENT_AT.search(event):
                self._delays_ns.append(now_ns - int(match[1]))
        if pending.endswith(b"0\r\n\r\n"):
            self._done.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or ConnectionError("the server cut a stream"))


def fetch_stats(port: int) -> dict[str, Any]:
    """Read the server's notes over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/stats")
    stats: dict[str, Any] = orjson.loads(connection.getresponse().read())
    connection.close()
    return stats


async def measure_echo(port: int, *, num_requests: int, num_connections: int) -> dict[str, float]:
    """Closed loop of small JSON requests; returns requests/s and the server's CPU time a request."""
    loop = asyncio.get_running_loop()
    budget = [num_requests]
    done = [loop.create_future() for _ in range(num_connections)]
    before, start_ns = await asyncio.to_thread(fetch_stats, port), time.monotonic_ns()
    for future in done:
        await loop.create_connection(partial(_EchoConnection, budget, future), "127.0.0.1", port)
    await asyncio.wait_for(asyncio.gather(*done), timeout=60)
    wall_s = (time.monotonic_ns() - start_ns) / 1e9
    after = await asyncio.to_thread(fetch_stats, port)
    return {
        "requests_per_s": num_requests / wall_s,
        "cpu_us_per_request": (after["cpu_ns"] - before["cpu_ns"]) / num_requests / 1e3,
    }


async def measure_streams(port: int, *, num_streams: int, num_rounds: int, interval_us: int) -> dict[str, float]:
    """Open all streams, read every chunk; returns chunks/s, the server's CPU time a chunk, and the chunks' age on arrival."""
    loop = asyncio.get_running_loop()
    target = f"/stream?streams={num_streams}&rounds={num_rounds}&interval_us={interval_us}"
    delays_ns: list[int] = []
    done = [loop.create_future() for _ in range(num_streams)]
    protocols = []
    for future in done:
        _, protocol = await loop.create_connection(partial(_StreamConnection, target, future, delays_ns), "127.0.0.1", port)
        protocols.append(protocol)
    await asyncio.wait_for(asyncio.gather(*done), timeout=60)
    num_events = sum(protocol.num_events for protocol in protocols)
    if num_events != num_streams * num_rounds:
        raise RuntimeError(f"{num_events} events arrived, {num_streams * num_rounds} were sent")
    report = (await asyncio.to_thread(fetch_stats, port))["stream"]
    delays_ns.sort()
    return {
        "chunks_per_s": report["num_chunks"] / report["wall_ns"] * 1e9,
        "cpu_us_per_chunk": report["cpu_ns"] / report["num_chunks"] / 1e3,
        "delay_p50_ms": delays_ns[len(delays_ns) // 2] / 1e6,
        "delay_p99_ms": delays_ns[len(delays_ns) * 99 // 100] / 1e6,
    }
