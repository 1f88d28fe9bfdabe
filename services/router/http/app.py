"""The HTTP API as a raw ASGI application: routing, bodies, streams, errors. Part of the shell; shapes stand in openai.py.

A streamed answer begins with its first output, so whatever fails before that still gets its own status. While a request runs, one
task waits for the client's disconnect and ends the request at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import orjson

from headrace.errors import (
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestAbortedError,
    RequestFailedError,
    UnauthenticatedError,
    UnavailableError,
)
from headrace.telemetry import logs
from services.router.api_keys import ApiKeys
from services.router.generation import Engine, OutputStream
from services.router.http import anthropic_answers, native, openai, openai_answers, prompt_batch, serving, sse
from services.router.http.completion_streams import collect
from services.router.http.exchange import (
    Exchange,
    HttpLimits,
    Message,
    Receive,
    Send,
    close_on_disconnect,
    unless_disconnected,
)
from services.router.http.openai_answers import ChatAnswer, CompletionAnswer
from services.router.http.routing import ErrorShape, Route, RouteTable

log = logs.get_logger()


class HttpApp:
    """ASGI application over an `Engine`."""

    def __init__(self, engine: Engine, limits: HttpLimits, routes: Iterable[Route] = (), keys: ApiKeys | None = None) -> None:
        """`routes` are those of the protocols that have files of their own; without `keys` everybody may ask."""
        self._keys = keys or ApiKeys()
        self._engine = engine
        self._limits = limits
        self._routes = RouteTable([*self._own_routes(), *routes])

    def _own_routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", {"POST": self._chat}),
            Route("/v1/completions", {"POST": self._complete}),
            Route("/v1/models", {"GET": self._list_models}),
            Route("/v1/models/{model*}", {"GET": self._show_model}),
            Route("/tokenize", {"POST": self._tokenize}),
            Route("/detokenize", {"POST": self._detokenize}),
            Route("/flush_cache", {"POST": self._flush_cache}),
            Route("/health", {"GET": self._health}, is_open=True),
            Route("/ready", {"GET": self._ready}, is_open=True),
            Route("/metrics", {"GET": self._metrics}, is_open=True),
        ]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One exchange, from its head to its last byte; every error is answered in the shape of the path's protocol."""
        if scope["type"] != "http":
            raise RequestFailedError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, self._limits)
        error: HeadraceError | None = None
        found = self._routes.find(exchange.raw_path)
        try:
            await self._handle(exchange, found)
        except HeadraceError as failure:
            error = failure
        except Exception:
            log.exception("exchange.failed", path=exchange.path)
            error = RequestFailedError("internal error; the router's log has the details")
        if error is not None and not exchange.status:
            # Sent to a client that is gone, it goes nowhere; an abort from our side still needs an answer.
            await _respond_error(exchange, error, openai_answers.error_object if found is None else found[0].error_object)
        if exchange.call is not None:
            # 499 is what proxies log for a client that went away.
            status = "499" if isinstance(error, RequestAbortedError) else str(exchange.status)
            self._engine.end_call(exchange.call, status=status, error_code=None if error is None else error.code)

    async def _handle(self, exchange: Exchange, found: tuple[Route, dict[str, str]] | None) -> None:
        if found is None:
            raise NotFoundError(f"no such path: {exchange.method} {exchange.path[:200]}")
        route, exchange.path_values = found
        handler = route.methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            await _respond_wrong_method(exchange, route)
            return
        if exchange.method == "POST":
            self._begin(exchange, route.template)
        # A request of a batch was let in with its batch.
        if not route.is_open and exchange.tenant is None:
            exchange.key_name = self._keys.check(serving.authorization(exchange))
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
        stream = serving.open_stream(exchange, self._engine, parsed.generation, user=parsed.user, is_streaming=parsed.is_streaming)
        await self._send(exchange, stream, parsed, ChatAnswer)

    async def _complete(self, exchange: Exchange) -> None:
        parsed = openai.parse_completion(await exchange.read_body())
        stream = await prompt_batch.open_prompts(exchange, self._engine, parsed)
        await self._send(exchange, stream, parsed, CompletionAnswer)

    async def _send(
        self, exchange: Exchange, stream: OutputStream, parsed: openai.ParsedRequest, answer_class: type[ChatAnswer]
    ) -> None:
        answer = answer_class(
            exchange.open_call.request_id,
            model=stream.model,
            created_unix_s=int(time.time()),
            include_usage=parsed.include_usage,
            has_running_usage=parsed.has_running_usage,
            keeps_logprobs=parsed.keeps_logprobs,
            tells_prompt=parsed.tells_prompt,
        )
        watcher = asyncio.create_task(close_on_disconnect(exchange.receive, stream))
        try:
            send = _send_stream if parsed.is_streaming else _send_whole
            await send(exchange, stream, answer, parsed.num_choices)
        finally:
            watcher.cancel()
            stream.close()

    # Tokens.

    async def _tokenize(self, exchange: Exchange) -> None:
        request = openai.parse_tokenize(await exchange.read_body())
        encoded = await unless_disconnected(exchange, self._engine.tokenize(request.model, request.prompt, exchange.open_call))
        await exchange.respond(200, native.tokens(encoded))

    async def _detokenize(self, exchange: Exchange) -> None:
        request = openai.parse_detokenize(await exchange.read_body())
        answer = self._engine.detokenize(
            request.model, request.token_ids, exchange.open_call, skip_special_tokens=request.skip_special_tokens
        )
        await exchange.respond(200, native.text(await unless_disconnected(exchange, answer)))

    # The operator's.

    async def _flush_cache(self, exchange: Exchange) -> None:
        await exchange.respond(200, native.flushed(await self._engine.flush_cache(exchange.open_call)))

    # Questions, answered without entering any queue.

    async def _list_models(self, exchange: Exchange) -> None:
        offers = self._engine.list_models()
        # Two protocols have this path; one of them always names its version.
        if "anthropic-version" in exchange.headers:
            await exchange.respond(200, anthropic_answers.models_page(offers))
        else:
            await exchange.respond(200, orjson.dumps(openai_answers.models_page(offers)))

    async def _show_model(self, exchange: Exchange) -> None:
        name = exchange.path_values["model"]
        for offer in self._engine.list_models():
            if offer.name == name:
                is_anthropic = "anthropic-version" in exchange.headers
                shape = anthropic_answers.model_object if is_anthropic else openai_answers.model_object
                await exchange.respond(200, orjson.dumps(shape(offer)))
                return
        raise NotFoundError(f"the model {name[:200]!r} does not exist or is not served now", param="model")

    async def _health(self, exchange: Exchange) -> None:
        await exchange.respond(200, native.health(self._engine.health()))

    async def _ready(self, exchange: Exchange) -> None:
        reason = self._engine.not_ready_reason()
        await exchange.respond(200 if reason is None else 503, native.readiness(reason))

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.respond(200, self._engine.metrics(), content_type=b"text/plain; version=0.0.4; charset=utf-8")


async def _respond_error(exchange: Exchange, error: HeadraceError, shape: ErrorShape) -> None:
    headers = []
    if isinstance(error, (OverloadedError, UnavailableError)):
        headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after_s))))
    if isinstance(error, UnauthenticatedError):
        headers.append((b"www-authenticate", b"Bearer"))
    await exchange.respond(openai_answers.error_status(error), orjson.dumps(shape(error)), headers=headers)


async def _respond_wrong_method(exchange: Exchange, route: Route) -> None:
    allowed = ", ".join(route.methods)
    error = InvalidRequestError(f"{exchange.method} is not allowed on {exchange.path}; use {allowed}")
    await exchange.respond(405, orjson.dumps(route.error_object(error)), headers=[(b"allow", allowed.encode())])


async def _send_stream(exchange: Exchange, stream: OutputStream, answer: ChatAnswer, num_choices: int) -> None:
    piece = await stream.next()
    await exchange.start(200, sse.HEADERS)
    chunk = b"".join(answer.first_chunk(choice) for choice in range(num_choices))
    num_unfinished = num_choices
    try:
        while True:
            usage_so_far = _usage(stream) if answer.has_running_usage else None
            chunk += answer.output_chunk(piece, usage_so_far)
            if piece.finish_reason is not None:
                chunk += answer.last_chunk(piece.finish_reason, piece.choice, usage_so_far)
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
    choices = await collect(stream, num_choices)
    await exchange.respond(200, answer.whole(choices, _usage(stream)))


def _usage(stream: OutputStream) -> dict[str, object]:
    return openai_answers.usage(
        num_prompt_tokens=stream.num_prompt_tokens,
        num_output_tokens=stream.num_output_tokens,
        num_cached_tokens=stream.num_cached_tokens,
        num_reasoning_tokens=stream.num_reasoning_tokens,
    )
