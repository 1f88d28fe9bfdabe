"""The HTTP API as a raw ASGI application: routing, bodies, streams, errors. Part of the shell; shapes stand in openai.py.

A streamed answer begins with its first output, so whatever fails before that still gets its own status. While a request runs, one
task waits for the client's disconnect and ends the request at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import orjson

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestAbortedError,
    RequestFailedError,
    RequestTooLargeError,
    UnavailableError,
)
from headrace.telemetry import logs
from services.router.generation import Call, Engine, OutputStream
from services.router.http import native, openai, openai_answers, sse
from services.router.http.openai_answers import ChatAnswer, CompletionAnswer
from services.router.tenants import tenant_of

log = logs.get_logger()

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_Answer = TypeVar("_Answer")

CUT_EXTENSION = "headrace.cut"
"""Key under `scope["extensions"]` of a function that breaks the connection; our server puts it there."""
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
        self.method: str = scope["method"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.cut: Callable[[], object] | None = scope.get("extensions", {}).get(CUT_EXTENSION)
        self.call: Call | None = None
        self.status = 0
        self.receive = receive
        self._send = send
        self._limits = limits

    async def read_body(self) -> bytes:
        """The whole body.

        Raises:
            RequestTooLargeError: It is over the limit; said as soon as that is known.
            DeadlineExceededError: The client sends too slowly.
            RequestAbortedError: The client went away.
        """
        self._check_head()
        limit = self._limits.max_body_bytes
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise RequestAbortedError("the client went away while it sent the body")
                    num_bytes += len(message.get("body", b""))
                    if num_bytes > limit:
                        raise _too_large(limit, f"more than {limit}")
                    chunks.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise DeadlineExceededError(f"the body did not arrive within {self._limits.body_timeout_s:g} s") from None

    def _check_head(self) -> None:
        limit = self._limits.max_body_bytes
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit, length)
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
        self, status: int, body: bytes, *, content_type: bytes = JSON, headers: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Answer in one piece. A client that does not take it in time is cut off."""
        head = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *(headers or [])]
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
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})


Handler = Callable[[Exchange], Awaitable[None]]


class HttpApp:
    """ASGI application over an `Engine`."""

    def __init__(self, engine: Engine, limits: HttpLimits) -> None:
        self._engine = engine
        self._limits = limits
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._complete},
            "/v1/models": {"GET": self._list_models},
            "/v1/models/{model}": {"GET": self._show_model},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/flush_cache": {"POST": self._flush_cache},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One exchange, from its head to its last byte; every error is answered in OpenAI's shape."""
        if scope["type"] != "http":
            raise RequestFailedError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, self._limits)
        error: HeadraceError | None = None
        try:
            await self._route(exchange)
        except HeadraceError as failure:
            error = failure
        except Exception:
            log.exception("exchange.failed", path=exchange.path)
            error = RequestFailedError("internal error; the router's log has the details")
        if error is not None and not exchange.status:
            # Sent to a client that is gone, it goes nowhere; an abort from our side still needs an answer.
            await self._respond_error(exchange, error)
        if exchange.call is not None:
            # 499 is what proxies log for a client that went away.
            status = "499" if isinstance(error, RequestAbortedError) else str(exchange.status)
            self._engine.end_call(exchange.call, status=status, error_code=None if error is None else error.code)

    async def _route(self, exchange: Exchange) -> None:
        route = exchange.path
        if route not in self._routes and route.startswith("/v1/models/"):
            route = "/v1/models/{model}"
        methods = self._routes.get(route)
        if methods is None or "{" in exchange.path:
            raise NotFoundError(f"no such path: {exchange.method} {exchange.path[:200]}")
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            await self._respond_wrong_method(exchange, methods)
            return
        if "POST" in methods:
            self._begin(exchange, route)
        await handler(exchange)

    def _begin(self, exchange: Exchange, route: str) -> None:
        headers = exchange.headers
        call = self._engine.begin_call(
            protocol="http", endpoint=route, traceparent=headers.get("traceparent", ""), tracestate=headers.get("tracestate", "")
        )
        call.cut = exchange.cut
        exchange.call = call
        call.timeout_s = exchange.timeout_s()

    # Generation.

    async def _chat(self, exchange: Exchange) -> None:
        parsed = openai.parse_chat(await exchange.read_body())
        await self._generate(exchange, parsed, ChatAnswer)

    async def _complete(self, exchange: Exchange) -> None:
        parsed = openai.parse_completion(await exchange.read_body())
        await self._generate(exchange, parsed, CompletionAnswer)

    async def _generate(self, exchange: Exchange, parsed: openai.ParsedRequest, answer_class: type[ChatAnswer]) -> None:
        call = exchange.call
        assert call is not None
        call.is_streaming = parsed.is_streaming
        call.tenant = tenant_of(parsed.user, exchange.headers.get("authorization", ""))
        stream = self._engine.open_stream(parsed.generation, call)
        answer = answer_class(
            call.request_id, model=stream.model, created_unix_s=int(time.time()), include_usage=parsed.include_usage
        )
        watcher = asyncio.create_task(_close_on_disconnect(exchange.receive, stream))
        try:
            send = _send_stream if parsed.is_streaming else _send_whole
            await send(exchange, stream, answer, parsed.generation.num_choices)
        finally:
            watcher.cancel()
            stream.close()

    # Tokens.

    async def _tokenize(self, exchange: Exchange) -> None:
        request = openai.parse_tokenize(await exchange.read_body())
        assert exchange.call is not None
        encoded = await _unless_disconnected(exchange, self._engine.tokenize(request.model, request.prompt, exchange.call))
        await exchange.respond(200, native.tokens(encoded))

    async def _detokenize(self, exchange: Exchange) -> None:
        request = openai.parse_detokenize(await exchange.read_body())
        assert exchange.call is not None
        answer = self._engine.detokenize(
            request.model, request.token_ids, exchange.call, skip_special_tokens=request.skip_special_tokens
        )
        await exchange.respond(200, native.text(await _unless_disconnected(exchange, answer)))

    # The operator's.

    async def _flush_cache(self, exchange: Exchange) -> None:
        assert exchange.call is not None
        await exchange.respond(200, native.flushed(await self._engine.flush_cache(exchange.call)))

    # Questions, answered without entering any queue.

    async def _list_models(self, exchange: Exchange) -> None:
        await exchange.respond(200, orjson.dumps(openai_answers.models_page(self._engine.list_models())))

    async def _show_model(self, exchange: Exchange) -> None:
        name = unquote(exchange.path.removeprefix("/v1/models/"))
        for offer in self._engine.list_models():
            if offer.name == name:
                await exchange.respond(200, orjson.dumps(openai_answers.model_object(offer)))
                return
        raise NotFoundError(f"the model {name[:200]!r} does not exist or is not served now", param="model")

    async def _health(self, exchange: Exchange) -> None:
        await exchange.respond(200, native.health(self._engine.health()))

    async def _ready(self, exchange: Exchange) -> None:
        reason = self._engine.not_ready_reason()
        await exchange.respond(200 if reason is None else 503, native.readiness(reason))

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.respond(200, self._engine.metrics(), content_type=b"text/plain; version=0.0.4; charset=utf-8")

    # Errors.

    async def _respond_error(self, exchange: Exchange, error: HeadraceError) -> None:
        headers = []
        if isinstance(error, (OverloadedError, UnavailableError)):
            headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after_s))))
        body = orjson.dumps(openai_answers.error_object(error))
        await exchange.respond(openai_answers.error_status(error), body, headers=headers)

    async def _respond_wrong_method(self, exchange: Exchange, methods: dict[str, Handler]) -> None:
        allowed = ", ".join(methods)
        error = InvalidRequestError(f"{exchange.method} is not allowed on {exchange.path}; use {allowed}")
        body = orjson.dumps(openai_answers.error_object(error))
        await exchange.respond(405, body, headers=[(b"allow", allowed.encode())])


async def _send_stream(exchange: Exchange, stream: OutputStream, answer: ChatAnswer, num_choices: int) -> None:
    piece = await stream.next()
    await exchange.start(200, sse.HEADERS)
    chunk = b"".join(answer.first_chunk(choice) for choice in range(num_choices))
    num_unfinished = num_choices
    try:
        while True:
            if piece.text:
                chunk += answer.text_chunk(piece.text, piece.choice)
            if piece.finish_reason is not None:
                chunk += answer.last_chunk(piece.finish_reason, piece.choice)
                num_unfinished -= 1
                if not num_unfinished:
                    break
            if chunk:
                await exchange.write(chunk)
                chunk = b""
            piece = await stream.next()
    except HeadraceError as error:
        # The status is gone already: the error is the stream's last event.
        await exchange.write(sse.event(openai_answers.error_object(error)), is_last=True)
        raise
    await exchange.write(chunk + answer.usage_chunk(_usage(stream)) + openai_answers.DONE, is_last=True)


async def _send_whole(exchange: Exchange, stream: OutputStream, answer: ChatAnswer, num_choices: int) -> None:
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    finish_reasons: dict[int, str] = {}
    while len(finish_reasons) < num_choices:
        piece = await stream.next()
        texts[piece.choice].append(piece.text)
        if piece.finish_reason is not None:
            finish_reasons[piece.choice] = piece.finish_reason
    choices = [("".join(text), finish_reasons[choice]) for choice, text in enumerate(texts)]
    await exchange.respond(200, answer.whole(choices, _usage(stream)))


def _usage(stream: OutputStream) -> dict[str, object]:
    return openai_answers.usage(
        num_prompt_tokens=stream.num_prompt_tokens,
        num_output_tokens=stream.num_output_tokens,
        num_cached_tokens=stream.num_cached_tokens,
    )


async def _close_on_disconnect(receive: Receive, stream: OutputStream) -> None:
    await _disconnected(receive)
    stream.close()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _unless_disconnected(exchange: Exchange, answer: Coroutine[Any, Any, _Answer]) -> _Answer:
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


def _too_large(limit: int, size: str) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body must be at most {limit} bytes (router.max_body_bytes); got {size}")
