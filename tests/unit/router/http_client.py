"""A client that drives the ASGI application directly, for tests of protocol layers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from services.router.http.app import HttpApp
from services.router.http.batches.runner import BatchSettings
from services.router.http.batches.storage import FileLimits
from services.router.http.exchange import HttpLimits
from services.router.http.protocols import StorageSettings
from services.router.http.responses.entries import HistoryLimits
from tests.patience import WAIT_S

LIMITS = HttpLimits(max_body_bytes=100_000, body_timeout_s=WAIT_S, max_timeout_s=100, send_timeout_s=WAIT_S)


def storage_settings(**changes: Any) -> StorageSettings:
    """Everything in memory, and small; nothing on a disk unless a test says where."""
    given: dict[str, Any] = {
        "history_path": ":memory:",
        "history": HistoryLimits(max_entries=100, max_bytes=1_000_000, ttl_s=1000),
        "directory": Path("/nonexistent"),
        "files": FileLimits(max_files=5, max_total_bytes=100_000, max_batches=3),
        "max_file_bytes": 50_000,
        "batches": BatchSettings(concurrency=4, max_requests=20),
        **changes,
    }
    return StorageSettings(**given)


class Answer:
    """What one exchange gave."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.chunks: list[bytes] = []
        self.is_done = False
        self.gone = asyncio.Event()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """An NDJSON body."""
        return [json.loads(line) for line in self.body.splitlines() if line]

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Server-sent events as (name, value)."""
        found = []
        for block in self.body.decode().split("\n\n"):
            if not block:
                continue
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            value = fields["data"]
            found.append((fields.get("event", ""), value if value == "[DONE]" else json.loads(value)))
        return found


async def ask(
    app: HttpApp,
    method: str,
    path: str,
    body: Any = None,
    *,
    answer: Answer | None = None,
    raw: bytes | None = None,
    **headers: str,
) -> Answer:
    """One exchange; `answer.gone.set()` disconnects."""
    answer = answer or Answer()
    parts = [raw if raw is not None else b"" if body is None else json.dumps(body).encode()]

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        await answer.gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not answer.status
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        assert not answer.is_done
        answer.chunks.append(message["body"])
        answer.body += message["body"]
        answer.is_done = not message["more_body"]

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    bare, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": bare, "query_string": query.encode(), "headers": named}
    await app(scope, receive, send)
    return answer
