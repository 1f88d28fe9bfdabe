"""The engine as protocol layers see it: opens requests on the back-plane, hands their output to its reader. Part of the shell.

It owns admission, the readers of open requests, and what is measured of client calls.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from headrace.errors import (
    HeadraceError,
    InvalidRequestError,
    RequestAbortedError,
    RequestFailedError,
    UnavailableError,
)
from headrace.telemetry import logs, names
from headrace.telemetry.metrics import RouterMetrics
from headrace.telemetry.traces import Context, SpanKind, Tracer
from services.router import messages
from services.router.admission import Admission
from services.router.backplane import Backplane
from services.router.config import Settings
from services.router.directory import engine_load
from services.router.embed_calls import EmbedCalls
from services.router.generation import (
    Call,
    EncodedPrompt,
    EngineLoad,
    GenerationRequest,
    KvSource,
    ModelDescription,
    ModelOffer,
    OutputPiece,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from services.router.observation import Observation
from services.router.open_request import Kind, OpenRequest, Patience, begin_beside
from services.router.output_buffer import OutputBuffer
from services.router.tenants import cache_namespace
from services.router.tools import with_checked_tools

log = logs.get_logger()

_FLUSH_WAIT_S = 10.0
_SPAN_NAMES = {"http": names.SPAN_ROUTER_HTTP, "grpc": names.SPAN_ROUTER_GRPC}


class _Choice:
    """One choice of a client's request: reads an open request for its stream. Implements `Reader`."""

    def __init__(self, stream: ClientStream, request: OpenRequest, index: int, *, seed: int) -> None:
        self.request = request
        self.finish_reason: str | None = None
        self.seed = seed
        self.context: Context = stream.observation.context
        self.deadline_unix_ns = stream.call.started_unix_ns + (request.deadline_ns - stream.call.started_ns)
        self._stream = stream
        self._index = index

    def on_arrival(self, edge: str, *, num_tokens: int, enqueued_unix_ns: int, now_ns: int) -> None:
        """An answer has come from a link."""
        observation = self._stream.observation
        if num_tokens:
            now_unix_ns = time.time_ns() if observation.is_traced else 0
            observation.on_tokens(
                self._index, num_tokens, enqueued_unix_ns=enqueued_unix_ns, now_ns=now_ns, now_unix_ns=now_unix_ns
            )
        elif observation.is_traced:
            observation.record_queue(edge, enqueued_unix_ns, time.time_ns())

    def share_tokens(self) -> None:
        """The prompt's tokens are known."""
        self._stream.open_others()

    def deliver(self, piece: OutputPiece) -> None:
        """New output from the core."""
        self.finish_reason = piece.finish_reason
        self._stream.put(piece, self._index)

    def end(self, error: HeadraceError | None) -> None:
        """The request is over."""
        self._stream.on_choice_end(error)


class ClientStream:
    """The open requests of one client call, one a choice, and what came of them. Implements `OutputStream`."""

    def __init__(self, gateway: Gateway, requests: list[OpenRequest], call: Call, observation: Observation, buffer: OutputBuffer):
        self.call = call
        self.buffer = buffer
        self.observation = observation
        self._gateway = gateway
        asked, drawn = requests[0].generation.sampling.seed, secrets.randbits(64)
        self._choices = [
            _Choice(self, request, index, seed=messages.drawn_seed(asked, drawn, index)) for index, request in enumerate(requests)
        ]
        self._num_running = 0
        self._error: HeadraceError | None = None
        self._is_over = False
        self._wake: asyncio.Future[None] | None = None

    @property
    def model(self) -> str:
        """The model that answers."""
        return self._choices[0].request.generation.model

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt; known with the first output."""
        encoded = self._choices[0].request.encoded
        return 0 if encoded is None else int(encoded.token_ids.size)

    @property
    def num_output_tokens(self) -> int:
        """Tokens made so far, over all choices."""
        return sum(len(choice.request.output_tokens) for choice in self._choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV was reused, for whichever choice they were fewest: those of others may be the first one's."""
        return min(choice.request.num_cached_tokens for choice in self._choices)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens made so far that were reasoning, over all choices."""
        return sum(choice.request.read.num_reasoning_tokens for choice in self._choices)

    async def next(self) -> OutputPiece:
        """All output of one choice since it was last given, waiting for some."""
        self.buffer.come_back()
        while not self.buffer.is_ready:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self.buffer.take(time.monotonic_ns())

    def close(self) -> None:
        """The reader leaves."""
        self._gateway.close_stream(self, RequestAbortedError("the client went away"))

    def open_first(self) -> None:
        """Begin; the other choices follow when the prompt's tokens are known."""
        self._open(self._choices[0])

    def open_others(self) -> None:
        """The first choice has the prompt's tokens: the others begin with them."""
        first = self._choices[0].request
        for choice in self._choices[1:]:
            if self._error is None:
                begin_beside(choice.request, first)
                self._open(choice)

    def end_all(self, error: HeadraceError) -> None:
        """End what still runs, from our side."""
        for choice in self._choices:
            self._gateway.backplane.end(choice.request.request_id, error)

    def put(self, piece: OutputPiece, choice: int) -> None:
        """New output of a choice."""
        self.buffer.put(piece, choice)
        self._wake_reader()
        if self.buffer.is_over_limit:
            self._gateway.cut_off(self)

    def on_choice_end(self, error: HeadraceError | None) -> None:
        """A choice is over; with an error, all are: a client cannot be told of one alone."""
        self._num_running -= 1
        if error is not None and self._error is None:
            self._error = error
            self.buffer.fail(error)
            self.end_all(RequestAbortedError("another choice of the request failed"))
        # Ending the others may have brought us here before.
        if not self._num_running and not self._is_over:
            self._is_over = True
            now_ns = time.monotonic_ns()
            self._gateway.turnstile.leave(now_ns, len(self._choices))
            self._gateway.num_online_requests -= len(self._choices) if self.call.is_online else 0
            requests = [choice.request for choice in self._choices]
            reasons = [choice.finish_reason for choice in self._choices]
            self.observation.end(requests, self._error, finish_reasons=reasons, now_ns=now_ns)
        self._wake_reader()

    def _open(self, choice: _Choice) -> None:
        self._num_running += 1
        self._gateway.backplane.open(choice.request, choice)

    def _wake_reader(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class _TokenizerCall:
    """A tokenize or detokenize call: one answer, awaited."""

    def __init__(self, gateway: Gateway, call: Call, request: OpenRequest) -> None:
        self.context: Context = call.context
        self.deadline_unix_ns = call.started_unix_ns + (request.deadline_ns - call.started_ns)
        self.seed = 0
        self.text = ""
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gateway = gateway

    def on_arrival(self, edge: str, *, num_tokens: int, enqueued_unix_ns: int, now_ns: int) -> None:
        """An answer has come from a link."""
        self._gateway.tracer.record_queue(
            edge, parent=self.context, enqueued_unix_ns=enqueued_unix_ns, taken_unix_ns=time.time_ns()
        )

    def share_tokens(self) -> None:
        """There are no choices here."""

    def deliver(self, piece: OutputPiece) -> None:
        """The text of a detokenize call."""
        self.text = piece.text

    def end(self, error: HeadraceError | None) -> None:
        """The call is over."""
        self._gateway.turnstile.leave(time.monotonic_ns())
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(error)


class Turnstile:
    """Admission, with a way to wait until everyone has left."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_busy = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Open requests."""
        return self._admission.num_open

    def enter(self, now_ns: int, num_choices: int = 1) -> None:
        """Count a request in, each of its choices as one, or refuse it."""
        self._admission.admit(now_ns, num_choices)
        self._is_idle.clear()
        self._is_busy.set()

    def leave(self, now_ns: int, num_choices: int = 1) -> None:
        """Count a request out."""
        self._admission.release(now_ns, num_choices)
        if not self._admission.num_open:
            self._is_idle.set()
            self._is_busy.clear()

    async def wait_idle(self) -> None:
        """Wait until no request is open."""
        await self._is_idle.wait()

    async def wait_busy(self) -> None:
        """Wait until a request is open."""
        await self._is_busy.wait()


class Gateway:
    """Implements `Engine` over the back-plane."""

    def __init__(
        self, backplane: Backplane, settings: Settings, *, tracer: Tracer, metrics: RouterMetrics, registry: CollectorRegistry
    ) -> None:
        self.tracer = tracer
        self.turnstile = Turnstile(Admission(settings.max_open_requests))
        self.is_draining = False
        self.num_online_requests = 0
        """Open generations that somebody waits for, each choice as one."""
        self.backplane = backplane
        self.kv: KvSource = backplane.caches
        self.load: Callable[[], EngineLoad] = partial(engine_load, backplane.directory)
        self.metrics: Callable[[], bytes] = partial(generate_latest, registry)
        self.settings = settings
        self._metrics = metrics
        self._streams: set[ClientStream] = set()
        self.patience = Patience(
            unavailable_wait_ns=_ns(settings.unavailable_wait_s),
            recovery_wait_ns=_ns(settings.recovery_wait_s),
            stall_nudge_ns=_ns(settings.stall_nudge_s),
            move_delay_ns=_ns(settings.move_delay_s),
            max_moves=settings.max_moves,
        )
        new_request = partial(_new_request, self)
        self.embed = EmbedCalls(new_request, self.turnstile, backplane, tracer=tracer, metrics=metrics).embed

    # Calls.

    def begin_call(self, *, protocol: str, endpoint: str, traceparent: str = "", tracestate: str = "") -> Call:
        """Open a client call."""
        started_unix_ns = time.time_ns()
        span = self.tracer.start(
            _SPAN_NAMES[protocol],
            parent=Context(traceparent, tracestate),
            start_unix_ns=started_unix_ns,
            kind=SpanKind.SERVER,
            root=True,
        )
        call = Call(uuid.uuid4().hex, endpoint, time.monotonic_ns(), started_unix_ns, span)
        span.rename(f"POST {endpoint}" if protocol == "http" else endpoint)
        span.set(names.ATTR_REQUEST_ID, call.request_id)
        span.set(names.ATTR_HTTP_ROUTE if protocol == "http" else names.ATTR_RPC_METHOD, endpoint)
        return call

    def end_call(self, call: Call, *, status: str, error_code: str | None = None) -> None:
        """Close a client call."""
        self._metrics.requests.labels(call.endpoint, status).inc()
        if status.isdigit():
            call.span.set(names.ATTR_HTTP_STATUS, int(status))
        if error_code is not None:
            self._metrics.failures.labels(error_code).inc()
            call.span.error(error_code)
        call.span.end()

    # Work.

    def open_stream(self, request: GenerationRequest, call: Call) -> ClientStream:
        """Start a generation."""
        request = replace(
            with_checked_tools(request),
            model=self.backplane.directory.resolve_model(request.model, time.monotonic_ns(), embeds=False),
            tenant=call.tenant,
            cache_namespace=cache_namespace(request.cache_salt, call.tenant if self.settings.isolate_tenants else None),
        )
        opened = self._admit(Kind.GENERATE, request, call)
        observation = Observation(call, request, tracer=self.tracer, metrics=self._metrics)
        stream = ClientStream(self, opened, call, observation, OutputBuffer(self.settings.client_buffer_bytes))
        self._streams.add(stream)
        self.num_online_requests += len(opened) if call.is_online else 0
        stream.open_first()
        return stream

    async def tokenize(self, model: str, prompt: Prompt, call: Call) -> EncodedPrompt:
        """Tokens of a prompt."""
        generation = GenerationRequest(self.backplane.directory.resolve_model(model, time.monotonic_ns()), prompt)
        request, _ = await self._ask_tokenizer(Kind.TOKENIZE, generation, call)
        if request.encoded is None:
            raise RequestFailedError("the tokenizer answered without tokens")
        return request.encoded

    async def detokenize(self, model: str, token_ids: Sequence[int], call: Call, *, skip_special_tokens: bool) -> str:
        """Text of tokens."""
        prompt = TokenPrompt(np.asarray(token_ids, dtype=np.int32))
        generation = GenerationRequest(
            self.backplane.directory.resolve_model(model, time.monotonic_ns()), prompt, skip_special_tokens=skip_special_tokens
        )
        return (await self._ask_tokenizer(Kind.DETOKENIZE, generation, call))[1]

    async def describe(self, model: str, call: Call, *, with_files: bool = False) -> ModelDescription:
        """What a model is."""
        generation = GenerationRequest(self.backplane.directory.resolve_model(model, time.monotonic_ns()), TextPrompt(""))
        kind = Kind.DESCRIBE_WITH_FILES if with_files else Kind.DESCRIBE
        request, _ = await self._ask_tokenizer(kind, generation, call)
        if request.description is None:
            raise RequestFailedError("the tokenizer answered without a description")
        return request.description

    async def flush_cache(self, call: Call) -> int:
        """Have all schedulers drop their prefix caches; gives the pages dropped.

        Raises:
            UnavailableError: There is no scheduler, or one does not answer in time.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            self.backplane.caches.flush(call.request_id, done.set_result)
            async with asyncio.timeout(_FLUSH_WAIT_S):
                return await done
        except TimeoutError:
            raise UnavailableError(f"router: a scheduler did not answer the flush within {_FLUSH_WAIT_S:g} s") from None
        finally:
            self.backplane.caches.forget_flush(call.request_id)

    async def _ask_tokenizer(self, kind: Kind, generation: GenerationRequest, call: Call) -> tuple[OpenRequest, str]:
        (request,) = self._admit(kind, generation, call)
        reader = _TokenizerCall(self, call, request)
        self.backplane.open(request, reader)
        try:
            await reader.answer
        finally:
            self.backplane.end(request.request_id, RequestAbortedError("the client went away"))
        return request, reader.text

    def close_stream(self, stream: ClientStream, error: HeadraceError) -> None:
        """The reader of a stream leaves; what still runs for it is aborted."""
        self._streams.discard(stream)
        stream.end_all(error)

    def cut_off(self, stream: ClientStream) -> None:
        """The client does not read: stop its request and break its connection, so that it holds nothing of others."""
        self._metrics.slow_clients.inc()
        self.close_stream(stream, RequestAbortedError("the client left its output unread for too long"))
        if stream.call.cut is not None:
            stream.call.cut()

    def cut_off_slow_clients(self) -> None:
        """Look for readers that took something long ago and have not come back."""
        now_ns, timeout_ns = time.monotonic_ns(), _ns(self.settings.slow_client_timeout_s)
        for stream in [stream for stream in self._streams if stream.buffer.is_reader_stuck(now_ns, timeout_ns)]:
            self.cut_off(stream)

    def _admit(self, kind: Kind, generation: GenerationRequest, call: Call) -> list[OpenRequest]:
        """One request for each choice."""
        requests = [_new_request(self, kind, generation, call, choice) for choice in range(generation.num_choices)]
        self.turnstile.enter(time.monotonic_ns(), generation.num_choices)
        return requests

    # Questions.

    def list_models(self) -> list[ModelOffer]:
        """Models that can be served now."""
        return self.backplane.directory.offers()

    def not_ready_reason(self) -> str | None:
        """Why a request could not be served now."""
        if self.is_draining:
            return "the router is draining"
        return self.backplane.directory.not_ready_reason(time.monotonic_ns())

    def health(self) -> dict[str, object]:
        """What the router knows of every stage."""
        stages = self.backplane.directory.stages(time.monotonic_ns(), time.time_ns())
        return {"draining": self.is_draining, "open_requests": self.turnstile.num_open, "stages": stages}


def _new_request(gateway: Gateway, kind: Kind, generation: GenerationRequest, call: Call, index: int) -> OpenRequest:
    """The open request of that number of a call, not yet counted in.

    Raises:
        UnavailableError: The router is draining.
        InvalidRequestError: The call's deadline is out of range.
    """
    if gateway.is_draining:
        raise UnavailableError("router: it is draining and takes no new requests; send this to another", retry_after_s=5.0)
    timeout_s = gateway.settings.default_timeout_s if call.timeout_s is None else call.timeout_s
    if not 0 < timeout_s <= gateway.settings.max_timeout_s:
        limit = gateway.settings.max_timeout_s
        raise InvalidRequestError(f"the deadline must be in (0, {limit:g}] seconds; got {timeout_s:g}", param="timeout")
    return OpenRequest(
        f"{call.request_id}-{index}" if index else call.request_id,
        kind=kind,
        generation=generation,
        stream_id=secrets.randbits(64),
        deadline_ns=call.started_ns + _ns(timeout_s),
        placement=gateway.backplane.directory,
        patience=gateway.patience,
        fork_group=call.request_id if generation.num_choices > 1 else "",
    )


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
