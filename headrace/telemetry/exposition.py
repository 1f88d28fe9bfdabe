"""The small HTTP endpoint of every service: /metrics, /health and /ready, answered outside any request queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from headrace.errors import ConfigError

READ_TIMEOUT_S = 5.0
HEAD_LIMIT_BYTES = 8192


class Exposition:
    """Serves one registry and two questions. Knows GET only, closes after each answer."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        health: Callable[[], dict[str, Any]],
        not_ready_reason: Callable[[], str | None],
        refresh: Callable[[], object] = lambda: None,
    ) -> None:
        """`refresh` is called before a page of metrics is made: what sets gauges need not run all the time."""
        self._registry = registry
        self._refresh = refresh
        self._health = health
        self._not_ready_reason = not_ready_reason
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Bind; a busy port is a ConfigError that names it."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_LIMIT_BYTES)
        except OSError as error:
            raise ConfigError(
                f"metrics port {port} on {host} cannot be bound ({error.strerror}): set another metrics port, or null for none"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the listening socket."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_TIMEOUT_S)
            status, content_type, body = self._answer(head.split(b"\r\n", 1)[0].decode("latin-1"))
            head_lines = (
                f"HTTP/1.1 {status}",
                f"Content-Type: {content_type}",
                f"Content-Length: {len(body)}",
                "Connection: close",
                "",
                "",
            )
            writer.write("\r\n".join(head_lines).encode())
            writer.write(body)
            await asyncio.wait_for(writer.drain(), READ_TIMEOUT_S)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            # A client that speaks no HTTP, or is gone: nothing to tell it.
            return
        finally:
            writer.close()

    def _answer(self, request_line: str) -> tuple[str, str, bytes]:
        method, _, rest = request_line.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method != "GET":
            return "405 Method Not Allowed", "text/plain", b"GET only\n"
        if path == "/metrics":
            self._refresh()
            return "200 OK", "text/plain; version=0.0.4; charset=utf-8", generate_latest(self._registry)
        if path == "/health":
            return "200 OK", "application/json", json.dumps(self._health()).encode()
        if path == "/ready":
            reason = self._not_ready_reason()
            status = "200 OK" if reason is None else "503 Service Unavailable"
            return status, "application/json", json.dumps({"ready": reason is None, "reason": reason}).encode()
        return "404 Not Found", "text/plain", b"/metrics, /health, /ready\n"
