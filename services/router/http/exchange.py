"""One HTTP request and its answer, whatever protocol it speaks: the body read within bounds, the deadline, the bytes back.

Part of the shell: it waits for the client. It knows no path and no shape.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from headrace.errors import DeadlineExceededError, InvalidRequestError, RequestAbortedError, RequestTooLargeError
from services.router.generation import Call, OutputStream

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
_Answer = TypeVar("_Answer")

CUT_EXTENSION = "headrace.cut"
"""Key under `scope["extensions"]` of a function that breaks the connection; our server puts it there."""
TENANT_EXTENSION = "headrace.tenant"
"""Key of the tenant that a request of our own is counted to; a client's has none."""
TIMEOUT_HEADER = "headrace-timeout-ms"
JSON = b"application/json"


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one exchange."""

    max_body_bytes: int
    body_timeout_s: float
    max_timeout_s: float
    send_timeout_s: float


class Exchange:
    """One HTTP request and its answer."""

    def __init__(self, scope: Message, receive: Receive, send: Send, limits: HttpLimits) -> None:
        self.path: str = scope["path"]
        self.raw_path: str = scope.get("raw_path", b"").decode("latin-1").partition("?")[0] or self.path
        """As the client wrote it: a slash in a name is still `%2F`."""
        self.method: str = scope["method"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        extensions = scope.get("extensions") or {}
        self.cut: Callable[[], object] | None = extensions.get(CUT_EXTENSION)
        self.tenant: str | None = extensions.get(TENANT_EXTENSION)
        self.key_name = ""
        """Name of the client's key; empty where none is asked for. What it stores is seen by the same key only."""
        self.query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
        self.path_values: dict[str, str] = {}
        """What stands in the path where its route has a name in braces."""
        self.call: Call | None = None
        self.status = 0
        self.receive = receive
        self._send = send
        self._limits = limits
        self._body_until: float | None = None

    @property
    def open_call(self) -> Call:
        """The call that was begun for this exchange."""
        assert self.call is not None
        return self.call

    async def read_body(self) -> bytes:
        """The whole body.

        Raises:
            RequestTooLargeError: It is over the limit; said as soon as that is known.
            DeadlineExceededError: The client sends too slowly.
            RequestAbortedError: The client went away.
        """
        self._check_head()
        return b"".join([chunk async for chunk in self.read_chunks(self._limits.max_body_bytes, setting="router.max_body_bytes")])

    async def read_chunks(self, limit: int, *, setting: str, bytes_a_timeout: int | None = None) -> AsyncIterator[bytes]:
        """The body in the parts that it comes in, all of them within `router.body_timeout_s`.

        Args:
            limit: Most bytes of all.
            setting: What an operator would change to allow more.
            bytes_a_timeout: For large bodies: each time so many bytes have come, there is as much time again.

        Raises:
            The same as `read_body`.
        """
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit, setting, length)
        num_bytes, began_s = 0, asyncio.get_running_loop().time()
        while True:
            message = await self._receive_part()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_large(limit, setting, f"more than {limit}")
            if bytes_a_timeout is not None:
                self._body_until = began_s + self._limits.body_timeout_s * (1 + num_bytes // bytes_a_timeout)
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return

    async def _receive_part(self) -> Message:
        try:
            async with asyncio.timeout_at(self._body_deadline()):
                message = await self.receive()
        except TimeoutError:
            raise DeadlineExceededError(f"the body did not arrive within {self._limits.body_timeout_s:g} s") from None
        if message["type"] == "http.disconnect":
            raise RequestAbortedError("the client went away while it sent the body")
        return message

    def _body_deadline(self) -> float:
        """Loop time by which the body must be there; it begins with the first look."""
        if self._body_until is None:
            self._body_until = asyncio.get_running_loop().time() + self._limits.body_timeout_s
        return self._body_until

    def _check_head(self) -> None:
        content_type = self.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise InvalidRequestError(f"content-type must be application/json; got {content_type[:60]!r}", param="content-type")
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise InvalidRequestError(f"content-encoding must be identity; got {encoding[:60]!r}", param="content-encoding")

    def timeout_s(self) -> float | None:
        """The deadline the client names, in seconds from now."""
        text = self.headers.get(TIMEOUT_HEADER)
        if text is None:
            return None
        most = int(self._limits.max_timeout_s * 1000)
        if not text.isascii() or not text.isdigit() or len(text) > 12 or not 1 <= int(text) <= most:
            message = f"{TIMEOUT_HEADER} must be in [1, {most}] milliseconds; got {text[:60]!r}"
            raise InvalidRequestError(message, param=TIMEOUT_HEADER)
        return int(text) / 1000

    async def respond(
        self, status: int, body: bytes, *, content_type: bytes = JSON, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """Answer in one piece. A client that does not take it in time is cut off."""
        head = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await self.start(status, head)
                await self.write(body, is_last=True)
        except TimeoutError:
            if self.cut is not None:
                self.cut()

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head of the answer."""
        self.status = status
        if self.call is not None:
            headers = [*headers, (b"x-request-id", self.call.request_id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Send a part of the body; waits while the client is slow."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def write_or_cut(self, body: bytes, *, is_last: bool = False) -> None:
        """Send a part of the body to a client whose output nobody else watches; one that does not take it in time is cut off.

        Raises:
            RequestAbortedError: It was.
        """
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await self.write(body, is_last=is_last)
        except TimeoutError:
            if self.cut is not None:
                self.cut()
            raise RequestAbortedError("the client left its output unread for too long") from None


async def close_on_disconnect(receive: Receive, stream: OutputStream) -> None:
    """Wait until the client is gone, and end its request."""
    await _disconnected(receive)
    stream.close()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def unless_disconnected(exchange: Exchange, answer: Coroutine[Any, Any, _Answer]) -> _Answer:
    """Await an answer; when the client goes away first, give it up."""
    work = asyncio.create_task(answer)
    watcher = asyncio.create_task(_disconnected(exchange.receive))
    try:
        await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RequestAbortedError("the client went away")
        return work.result()
    finally:
        watcher.cancel()
        work.cancel()


def _too_large(limit: int, setting: str, size: str) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body must be at most {limit} bytes ({setting}); got {size}")
