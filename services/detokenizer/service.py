"""The detokenizer's shell: streams of routers, tokens of schedulers, text back to the routers.

It dials routers and is dialled by schedulers, at an address it tells the routers when it registers. Each batch of tokens becomes at
most one message a router. Decoding runs on the event loop: a token costs a few microseconds, and one turn of the loop decodes a
bounded number of them; what is more waits its turn in a bounded backlog.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenizers import Tokenizer

from headrace.errors import HeadraceError, ModelError, NotFoundError, OverloadedError, ReplicaDeadError
from headrace.models.model_config import TOKENIZER_FILE
from headrace.service import ServiceContext
from headrace.telemetry import logs, names
from headrace.telemetry.metrics import DetokenizerMetrics
from headrace.telemetry.traces import Context, Span
from headrace.v1.common_pb2 import ModelInfo
from headrace.v1.control_pb2 import Load, Progress, Register, Role
from headrace.v1.detokenizer_pb2 import DetokenizerInbox, OpenStream, TokenBatch
from headrace.v1.router_pb2 import StreamGap
from headrace.v1.scheduler_pb2 import Stop
from headrace.wire.session import Peer
from headrace.wire.topology import DETOKENIZER_BACKPLANE, DETOKENIZER_SCHEDULER, ROUTER_BACKPLANE, ROUTER_DETOKENIZER
from services.detokenizer import logprobs
from services.detokenizer.config import Settings
from services.detokenizer.messages import output_deltas, stream_start
from services.detokenizer.streams import Batch, BatchEffects, StreamLimits, StreamTable
from services.detokenizer.token_table import TokenTable

if TYPE_CHECKING:
    from headrace.wire.fake import FakeBack, FakeFront
    from headrace.wire.link import Back, Front

log = logs.get_logger()

_HOUSEKEEPING_S: Final = 1.0


@dataclass(slots=True)
class _Trace:
    """What a traced stream's span needs to know at its end."""

    span: Span
    parent: Context
    has_tokens: bool = False
    num_tokens: int = 0
    decode_ns: int = 0


@dataclass(slots=True)
class _Task:
    """Decoding that waits for its turn of the event loop."""

    num_tokens: int
    queued_ns: int
    run: Callable[[], None]


class DetokenizerService:
    """Serves every router and scheduler that it knows."""

    def __init__(self, context: ServiceContext, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._metrics = DetokenizerMetrics(context.registry)
        self._model = ModelInfo()
        self._table: StreamTable | None = None
        self._front: Front | FakeFront | None = None
        self._back: Back | FakeBack | None = None
        self._routers: dict[int, Peer] = {}
        self._schedulers: dict[int, Peer] = {}
        self._traces: dict[int, _Trace] = {}
        self._backlog: deque[_Task] = deque()
        self._num_backlog_tokens = 0
        self._num_steps = 0
        self._last_step_unix_ns = 0
        self._resend_timer: asyncio.TimerHandle | None = None
        self._housekeeping_timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._is_stopped = False

    async def start(self) -> None:
        """Load the model's tokenizer, bind for schedulers, dial the routers.

        Raises:
            ModelError: The model directory cannot be used.
            ConfigError: The address cannot be bound.
        """
        directory = self._context.model_directory
        name = self._context.settings.model.name_for_clients
        table = await asyncio.to_thread(_load_table, directory, name)
        self._context.end_phase("tokenizer")
        settings = self._settings
        limits = StreamLimits(
            streams_max=settings.streams_max,
            pending_tokens_max=settings.pending_tokens_max,
            pending_age_max_ns=int(settings.pending_age_max_s * 1e9),
            unsent_tokens_max=settings.unsent_tokens_max,
            repeat_after_ns=int(settings.repeat_after_s * 1e9),
        )
        self._table = StreamTable(table, limits)
        self._model = ModelInfo(name=name, loaded_unix_s=int(time.time()))
        wire = self._context.wire
        self._front = wire.bind(DETOKENIZER_BACKPLANE, self._context.bind_address(DETOKENIZER_BACKPLANE), self)
        address = self._context.advertised_address(self._front.address)
        self._back = wire.dial(
            ROUTER_BACKPLANE,
            self._context.dial_targets(ROUTER_BACKPLANE),
            self,
            register=lambda: Register(
                role=Role.ROLE_DETOKENIZER, instance=self._context.instance, address=address, models=self.models()
            ),
        )
        self._housekeep()

    def on_peer(self, peer: Peer) -> None:
        """A router accepted us, or a scheduler registered."""
        (self._routers if peer.role == "router" else self._schedulers)[peer.incarnation] = peer

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A router's streams end with it. A scheduler's streams wait for whoever serves them next."""
        self._schedulers.pop(peer.incarnation, None)
        if self._routers.pop(peer.incarnation, None) is not None:
            self._end(self._streams.close_owner(peer.incarnation), reason="router_lost")

    def on_heartbeat(self, peer: Peer) -> None:
        """Peers' states change nothing here."""

    def on_message(self, peer: Peer, message: DetokenizerInbox, frames: list[memoryview]) -> None:
        """Take one message of a router or a scheduler; decoding may wait for its turn."""
        match message.WhichOneof("body"):
            case "token_batch":
                self._on_token_batch(peer, message.token_batch)
            case "open_stream":
                body, history = message.open_stream, frames[0] if frames else None
                num_tokens = len(history) // 4 if history is not None else 0
                self._when_its_turn(num_tokens, lambda: self._on_open_stream(peer, body, history))
            case "close_stream":
                stream_ids = list(message.close_stream.stream_ids)
                self._when_its_turn(0, lambda: self._on_close_stream(peer, stream_ids))

    def not_ready_reason(self) -> str | None:
        """Ready once a router has accepted us."""
        if self._back is None:
            return "the model's tokenizer is being loaded"
        return None if self._back.peers else "no router has answered yet"

    def models(self) -> tuple[ModelInfo, ...]:
        """The one model."""
        return (self._model,)

    def load(self) -> Load:
        """Open streams, those whose tokens came before them, and tokens that wait to be decoded."""
        if self._table is None:
            return Load()
        return Load(num_running=len(self._table), num_waiting=self._table.num_pending, num_waiting_tokens=self._num_backlog_tokens)

    def progress(self) -> Progress:
        """Batches decoded. Finding nothing to decode counts too: streams that wait for a scheduler are no stall here."""
        age_ns = time.monotonic_ns() - self._backlog[0].queued_ns if self._backlog else 0
        return Progress(num_steps=self._num_steps, last_step_unix_ns=self._last_step_unix_ns, oldest_waiting_age_ns=age_ns)

    def health(self) -> dict[str, Any]:
        """What /health adds."""
        return {"model": self._model.name, "streams": len(self._table) if self._table is not None else 0}

    async def drain(self) -> None:
        """Ask for no new streams and finish those that are open."""
        if self._back is None:
            return
        self._back.announce_drain()
        self._note_streams()
        await self._idle.wait()

    async def stop(self) -> None:
        """End what is open; routers begin their streams again elsewhere."""
        self._is_stopped = True
        self._backlog.clear()
        for timer in (self._resend_timer, self._housekeeping_timer):
            if timer is not None:
                timer.cancel()
        for trace in self._traces.values():
            trace.span.error("aborted")
            trace.span.end()
        self._traces.clear()

    @property
    def _streams(self) -> StreamTable:
        assert self._table is not None, "no message arrives before start() has bound and dialled"
        return self._table

    def _on_open_stream(self, peer: Peer, body: OpenStream, history: memoryview | None) -> None:
        now_unix_ns = time.time_ns()
        parent = Context(body.work.traceparent, body.work.tracestate)
        tracer = self._context.tracer
        tracer.record_queue(
            ROUTER_DETOKENIZER.name, parent=parent, enqueued_unix_ns=body.work.enqueued_unix_ns, taken_unix_ns=now_unix_ns
        )
        if peer.incarnation not in self._routers:
            return
        try:
            if body.model != self._model.name:
                raise NotFoundError(f"model: {body.model!r} is not served here; {self._model.name!r} is", param="model")
            effects = self._streams.open(stream_start(body, history), owner=peer.incarnation, now_ns=time.monotonic_ns())
        except HeadraceError as error:
            log.warning("stream.refused", request_id=body.work.request_id, error_type=error.code, message=error.message)
            self._metrics.dropped.labels(error.code).inc()
            self._streams.refuse(body.stream_id, owner=peer.incarnation)
            effects = BatchEffects(owners={peer.incarnation})
        if tracer.is_on and parent.is_sampled:
            self._end([body.stream_id], reason="begun_again")
            attributes = {names.ATTR_REQUEST_ID: body.work.request_id}
            span = tracer.start(names.SPAN_DETOKENIZER_STREAM, parent=parent, start_unix_ns=now_unix_ns, attributes=attributes)
            self._traces[body.stream_id] = _Trace(span, parent)
        self._follow(effects)

    def _on_close_stream(self, peer: Peer, stream_ids: list[int]) -> None:
        self._end(self._streams.close(stream_ids, owner=peer.incarnation), reason="closed")

    def _on_token_batch(self, peer: Peer, body: TokenBatch) -> None:
        batch = Batch(
            stream_ids=list(body.stream_ids),
            first_positions=list(body.first_positions),
            token_ids=list(body.token_ids),
            num_tokens=list(body.num_tokens),
            finish_reasons=list(body.finish_reasons),
            num_stop_tokens=list(body.num_stop_tokens),
            num_cached_tokens=list(body.num_cached_tokens),
            told=logprobs.told_by_stream(body),
        )
        batch.check()
        if self._num_backlog_tokens + len(batch.token_ids) > self._settings.backlog_tokens_max:
            self._metrics.dropped.labels("backlog_full").inc(len(batch.stream_ids))
            raise OverloadedError(
                f"detokenizer: {self._num_backlog_tokens} tokens wait to be decoded, the limit is "
                f"{self._settings.backlog_tokens_max}; the batch is dropped, and its streams will be asked for again"
            )
        for part in batch.split(self._settings.callback_tokens_max):
            self._when_its_turn(len(part.token_ids), partial(self._decode, peer, part, body.enqueued_unix_ns))

    def _decode(self, peer: Peer, batch: Batch, enqueued_unix_ns: int) -> None:
        taken_unix_ns, begun_ns = time.time_ns(), time.monotonic_ns()
        effects = self._streams.apply(batch, source=peer.incarnation, now_ns=begun_ns)
        self._metrics.batches.inc()
        self._metrics.tokens.inc(len(batch.token_ids))
        self._num_steps += 1
        self._last_step_unix_ns = taken_unix_ns
        if self._traces:
            self._trace_batch(batch, time.monotonic_ns() - begun_ns, enqueued_unix_ns, taken_unix_ns)
        self._follow(effects)

    def _trace_batch(self, batch: Batch, elapsed_ns: int, enqueued_unix_ns: int, taken_unix_ns: int) -> None:
        share_ns = elapsed_ns // max(1, len(batch.stream_ids))
        for index, stream_id in enumerate(batch.stream_ids):
            trace = self._traces.get(stream_id)
            if trace is None:
                continue
            trace.decode_ns += share_ns
            trace.num_tokens += batch.num_tokens[index] if batch.num_tokens else 1
            if not trace.has_tokens:
                trace.has_tokens = True
                self._context.tracer.record_queue(
                    DETOKENIZER_SCHEDULER.name, parent=trace.parent, enqueued_unix_ns=enqueued_unix_ns, taken_unix_ns=taken_unix_ns
                )

    def _follow(self, effects: BatchEffects) -> None:
        """Do what a batch or an opening asks for: text to routers, stops to schedulers, counts."""
        for source, stream_ids in effects.stops.items():
            self._send_stop(source, stream_ids)
        for owner in effects.owners:
            self._flush(owner)
        self._metrics.stops.inc(effects.num_stopped)
        self._metrics.gaps.inc(effects.num_gaps)
        if effects.num_evicted:
            self._metrics.dropped.labels("pending_full").inc(effects.num_evicted)
        self._note_streams()

    def _send_stop(self, source: int, stream_ids: list[int]) -> None:
        scheduler = self._schedulers.get(source)
        if scheduler is None:
            return
        try:
            scheduler.send("stop", Stop(stream_ids=stream_ids))
        except (OverloadedError, ReplicaDeadError) as error:
            # The table says so again while tokens of these streams still come.
            log.warning("stop.unsent", peer=scheduler.instance, streams=len(stream_ids), error_type=error.code)

    def _flush(self, owner: int) -> None:
        """Offer a router all that waits for it; what it cannot take now waits on, within bounds."""
        router = self._routers.get(owner)
        if router is None:
            return
        outbox = self._streams.outbox(owner)
        try:
            for stream_id, position in list(outbox.gaps.items()):
                router.send("stream_gap", StreamGap(stream_id=stream_id, expected_position=position))
                del outbox.gaps[stream_id]
            deltas = outbox.deltas()
            if deltas is not None:
                body = output_deltas(deltas, enqueued_unix_ns=time.time_ns())
                if deltas.told:
                    logprobs.fill(body, deltas.told, self._streams.pieces)
                router.send("output_deltas", body)
        except (OverloadedError, ReplicaDeadError) as error:
            # A router that is gone is reported by the link in a moment, and its streams are closed then.
            num_rewound = self._streams.mark_unsent(owner)
            if num_rewound:
                self._metrics.dropped.labels("router_full").inc(num_rewound)
                log.warning("streams.rewound", peer=router.instance, streams=num_rewound, error_type=error.code)
            self._resend_later()
            return
        self._end(self._streams.mark_sent(owner), reason="")

    def _resend_later(self) -> None:
        if self._resend_timer is None and not self._is_stopped:
            loop = asyncio.get_running_loop()
            self._resend_timer = loop.call_later(self._settings.resend_interval_s, self._resend)

    def _resend(self) -> None:
        self._resend_timer = None
        for owner in self._streams.unsent_owners():
            self._flush(owner)
        self._note_streams()

    def _when_its_turn(self, num_tokens: int, run: Callable[[], None]) -> None:
        """Run now if nothing is before it, else after what is, some tokens a turn of the event loop."""
        if not self._backlog and num_tokens <= self._settings.callback_tokens_max:
            run()
            return
        if not self._backlog:
            asyncio.get_running_loop().call_soon(self._work_off)
        self._backlog.append(_Task(num_tokens, time.monotonic_ns(), run))
        self._num_backlog_tokens += num_tokens

    def _work_off(self) -> None:
        num_tokens = 0
        while self._backlog and (num_tokens == 0 or num_tokens + self._backlog[0].num_tokens <= self._settings.callback_tokens_max):
            task = self._backlog[0]
            num_tokens += max(1, task.num_tokens)
            task.run()
            # Only now, so that nothing that arrives meanwhile runs before it.
            self._backlog.popleft()
            self._num_backlog_tokens -= task.num_tokens
        if self._backlog:
            asyncio.get_running_loop().call_soon(self._work_off)

    def _end(self, stream_ids: list[int], *, reason: str) -> None:
        """End the spans of streams that are over; `reason` is empty for those that ended well."""
        for stream_id in stream_ids if self._traces else ():
            trace = self._traces.pop(stream_id, None)
            if trace is None:
                continue
            trace.span.set(names.ATTR_NUM_TOKENS, trace.num_tokens)
            trace.span.set(names.ATTR_DECODE_NS, trace.decode_ns)
            if reason:
                trace.span.error("aborted", reason)
            trace.span.end()
        self._note_streams()

    def _note_streams(self) -> None:
        num_streams = len(self._streams)
        self._metrics.streams.set(num_streams)
        if num_streams:
            self._idle.clear()
        else:
            self._idle.set()

    def _housekeep(self) -> None:
        if self._is_stopped:
            return
        num_expired = self._streams.expire(now_ns=time.monotonic_ns())
        if num_expired:
            self._metrics.dropped.labels("pending_expired").inc(num_expired)
        if not self._backlog:
            self._num_steps += 1
        self._housekeeping_timer = asyncio.get_running_loop().call_later(_HOUSEKEEPING_S, self._housekeep)


def _load_table(directory: Path, model: str) -> TokenTable:
    path = directory / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: cannot be loaded: {error}; pull the model again") from error
    return TokenTable.from_tokenizer(tokenizer, model=model)
