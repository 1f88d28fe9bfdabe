"""Asks the HTTP application from inside, as a client would: batches take the way of every other request. Part of the shell."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from services.router.http.exchange import TENANT_EXTENSION, Application, Message


@dataclass(slots=True)
class InProcessAnswer:
    """An exchange's status, head and body."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class InProcessRequest:
    """One request on its way; `leave` is what a disconnect is for a client."""

    def __init__(self, path: str, body: bytes, tenant: str) -> None:
        self._path = path
        self._body: bytes | None = body
        self._tenant = tenant
        self._gone = asyncio.Event()
        self._answer = InProcessAnswer()

    async def ask(self, app: Application) -> InProcessAnswer:
        """The answer, whatever its status."""
        scope: Message = {
            "type": "http",
            "method": "POST",
            "path": self._path,
            "headers": [(b"content-type", b"application/json")],
            "extensions": {TENANT_EXTENSION: self._tenant},
        }
        await app(scope, self._receive, self._send)
        return self._answer

    def leave(self) -> None:
        """Give it up."""
        self._gone.set()

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answer.status = message["status"]
            self._answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self._answer.body += message["body"]
