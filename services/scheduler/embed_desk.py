"""The shell of what embeds: texts in, plans out to workers that embed, vectors back to the routers.

`WorkerSwitch` stands before the workers' link and hands each group to whoever plans its kind of work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.errors import HeadraceError, OverloadedError, ProtocolError, ReplicaDeadError
from headrace.telemetry import logs, names
from headrace.telemetry.metrics import SchedulerMetrics
from headrace.telemetry.traces import Context, Span, Tracer
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import router_pb2 as router
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import worker_pb2 as worker
from headrace.wire import topology
from headrace.wire.session import Peer
from services.scheduler import embed_messages
from services.scheduler.config import Settings
from services.scheduler.embeddings import Embeddings, EmbedLane, EmbedRequest

log = logs.get_logger()

Refuse = Callable[[int, str, HeadraceError], None]
"""Tells a router, by its incarnation, that a request of its has ended, and why."""


class _Hub(Protocol):
    """What the desk needs of the service."""

    metrics: SchedulerMetrics

    def wake(self) -> None:
        """Plan and carry out, once, after the messages that have arrived together."""

    def lanes_changed(self) -> None:
        """Tell the routers what can be served now."""


@dataclass(slots=True)
class _Trace:
    """Spans of one text: the wait for a step, then the step."""

    parent: Context
    queued_unix_ns: int
    run: Span | None = None


@dataclass(slots=True)
class _Site:
    """A lane and the worker behind it, with plans that a full queue refused."""

    peer: Peer
    lane: EmbedLane
    model: common.ModelInfo
    unsent: deque[tuple[worker.StepPlan, list[bytes]]] = field(default_factory=deque)

    def send(self) -> None:
        """Send the plans that have been made, as far as the queue takes them."""
        while self.unsent:
            try:
                self.peer.send("step_plan", *self.unsent[0])
            except OverloadedError:
                return
            except ReplicaDeadError:
                # The loss of the peer follows, and takes the lane with it.
                self.unsent.clear()
                return
            self.unsent.popleft()


class Mail:
    """Vectors on their way to the routers; what a full queue refuses goes with a later heartbeat."""

    def __init__(self) -> None:
        self._peers: dict[int, Peer] = {}
        self._unsent: dict[int, deque[tuple[router.Embeddings, list[bytes]]]] = {}

    def on_peer(self, peer: Peer) -> None:
        """A router is there."""
        self._peers[peer.incarnation] = peer

    def on_peer_lost(self, peer: Peer) -> None:
        """A router is gone."""
        self._peers.pop(peer.incarnation, None)
        self._unsent.pop(peer.incarnation, None)

    def post(self, owner: int, body: router.Embeddings, vectors: bytes) -> None:
        """Send after all before it, now or as soon as there is room. A router that is gone does not need it."""
        if owner in self._peers:
            self._unsent.setdefault(owner, deque()).append((body, [vectors]))
            self.send(owner)

    def send(self, owner: int) -> None:
        """Send what waits for a router."""
        peer, unsent = self._peers.get(owner), self._unsent.get(owner)
        while peer is not None and unsent:
            try:
                peer.send("embeddings", *unsent[0])
            except OverloadedError:
                return
            except ReplicaDeadError:
                unsent.clear()
                return
            unsent.popleft()
        self._unsent.pop(owner, None)


class EmbedDesk:
    """Handles the workers that embed, and the texts that routers submit."""

    def __init__(self, hub: _Hub, settings: Settings, *, tracer: Tracer, refuse: Refuse) -> None:
        self.mail = Mail()
        self._hub = hub
        self._tracer = tracer
        self._refuse = refuse
        self._sites: dict[int, _Site] = {}
        self._vocab_sizes: dict[str, int] = {}
        self.core = Embeddings(
            max_waiting_requests=settings.max_waiting_requests,
            max_waiting_tokens=settings.max_waiting_tokens,
            max_in_flight=2 if settings.run_ahead else 1,
            on_failed=self._on_failed,
        )

    @property
    def num_running(self) -> int:
        """Texts that are at workers."""
        return self.core.num_requests - self.core.num_waiting

    def models(self) -> list[common.ModelInfo]:
        """Models that can embed now, each with the longest text among its lanes."""
        found: dict[str, common.ModelInfo] = {}
        for site in self._sites.values():
            other = found.get(site.model.name)
            if other is None or other.max_model_len < site.model.max_model_len:
                found[site.model.name] = site.model
        return list(found.values())

    def submit(self, peer: Peer, submit: scheduler.Submit, frames: list[memoryview]) -> None:
        """Take a text.

        Raises:
            HeadraceError: It cannot be.
        """
        now_ns, now_unix_ns = time.monotonic_ns(), time.time_ns()
        request = embed_messages.embed_request(submit, frames, owner=peer.incarnation, now_ns=now_ns, now_unix_ns=now_unix_ns)
        embed_messages.check_tokens(request, self._vocab_sizes)
        parent = Context(submit.work.traceparent, submit.work.tracestate)
        request.trace = _Trace(parent, now_unix_ns)
        self._tracer.record_queue(
            topology.ROUTER_SCHEDULER.name,
            parent=parent,
            enqueued_unix_ns=submit.work.enqueued_unix_ns,
            taken_unix_ns=now_unix_ns,
        )
        self.core.submit(request, now_ns)

    def plan(self) -> None:
        """Make and send the plans that lanes can have now."""
        for site in self._sites.values():
            while not site.unsent and (step := self.core.plan(site.lane)) is not None:
                step_id, texts = step
                site.unsent.append(embed_messages.step_plan(step_id, texts, [self._begin(text) for text in texts]))
                site.send()
                self._hub.metrics.steps.inc()
                self._hub.metrics.step_tokens.inc(sum(len(text.tokens) for text in texts))

    # Workers

    def check(self, capacity: control.Capacity | None) -> None:
        """Raise why a worker group that embeds cannot be a lane."""
        assert capacity is not None
        embed_messages.embed_capacity(capacity)

    def on_peer(self, peer: Peer) -> None:
        """A worker group that embeds registered."""
        assert peer.capacity is not None
        capacity = embed_messages.embed_capacity(peer.capacity)
        lane = self.core.lane_joined(peer.incarnation, capacity)
        self._sites[peer.incarnation] = _Site(peer, lane, peer.capacity.model)
        self._vocab_sizes[capacity.model] = capacity.vocab_size
        log.info("lane.joined", worker=peer.instance, embeds=capacity.model, vector_size=capacity.vector_size)
        self._hub.lanes_changed()
        self._hub.wake()

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A worker group is gone: its texts wait for another."""
        site = self._sites.pop(peer.incarnation, None)
        if site is None:
            return
        log.warning("lane.lost", worker=peer.instance, reason=reason, num_sequences=sum(map(len, site.lane.in_flight.values())))
        self.core.lane_lost(peer.incarnation)
        self._hub.lanes_changed()
        self._hub.wake()

    def on_heartbeat(self, peer: Peer) -> None:
        """The worker may be draining, or read again."""
        site = self._sites.get(peer.incarnation)
        if site is not None:
            site.lane.is_draining = peer.is_draining
            site.send()
            self._hub.wake()

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """A step's vectors."""
        site = self._sites.get(peer.incarnation)
        if site is None:
            raise ProtocolError("a step result of a worker that is no lane")
        result: scheduler.StepResult = message.step_result
        vectors = embed_messages.vectors(result, frames, size=site.lane.capacity.vector_size)
        done = self.core.finish(site.lane, result.step_id, result.slots, embed_messages.failures(result))
        self._hub.metrics.step_duration.observe(max(0, result.finished_unix_ns - result.started_unix_ns) / 1e9)
        self.plan()
        places_of: dict[int, list[int]] = {}
        requests_of: dict[int, list[str]] = {}
        now_unix_ns = time.time_ns()
        for request, place in done:
            places_of.setdefault(request.owner, []).append(place)
            requests_of.setdefault(request.owner, []).append(request.request_id)
            self._end(request, now_unix_ns, None)
        for owner, places in places_of.items():
            body = router.Embeddings(request_ids=requests_of[owner], vector_size=vectors.shape[1])
            self.mail.post(owner, body, vectors[places].tobytes())
        self._hub.wake()

    def _begin(self, request: EmbedRequest) -> common.WorkHeader:
        """The header with which a text goes to a worker."""
        now_ns, now_unix_ns = time.monotonic_ns(), time.time_ns()
        trace = request.trace
        assert isinstance(trace, _Trace)
        attributes = {names.ATTR_REQUEST_ID: request.request_id}
        if trace.run is None:
            self._hub.metrics.queue_wait.observe((now_ns - request.queued_ns) / 1e9)
            self._tracer.record(
                names.SPAN_SCHEDULER_QUEUE,
                parent=trace.parent,
                start_unix_ns=trace.queued_unix_ns,
                end_unix_ns=now_unix_ns,
                attributes=attributes,
            )
            trace.run = self._tracer.start(
                names.SPAN_SCHEDULER_RUN, parent=trace.parent, start_unix_ns=now_unix_ns, attributes=attributes
            )
        return common.WorkHeader(
            request_id=request.request_id,
            traceparent=trace.run.context.traceparent,
            tracestate=trace.run.context.tracestate,
            deadline_unix_ns=request.deadline_ns - now_ns + now_unix_ns if request.deadline_ns else 0,
            enqueued_unix_ns=now_unix_ns,
        )

    @staticmethod
    def _end(request: EmbedRequest, now_unix_ns: int, error_code: str | None) -> None:
        assert isinstance(request.trace, _Trace)
        run = request.trace.run
        if run is not None:
            if error_code is not None:
                run.error(error_code)
            run.end(now_unix_ns)

    def _on_failed(self, request: EmbedRequest, error: HeadraceError) -> None:
        self._end(request, time.time_ns(), error.code)
        self._refuse(request.owner, request.request_id, error)


class Workers(Protocol):
    """What plans one kind of work."""

    def check(self, capacity: control.Capacity | None) -> None:
        """Raise a `HeadraceError` where a worker group cannot be a lane now."""

    def on_peer(self, peer: Peer) -> None:
        """A worker group registered."""

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A worker group is gone."""

    def on_heartbeat(self, peer: Peer) -> None:
        """A worker group lives."""

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """A step's result."""


class WorkerSwitch:
    """The handler of the workers' link: by what a group registered with."""

    def __init__(self, generating: Workers, embedding: Workers) -> None:
        self._generating = generating
        self._embedding = embedding

    def admit(self, register: control.Register) -> None:
        """Raise a `HeadraceError` where a worker group is not to be a lane now; it asks again."""
        capacity = register.capacity if register.HasField("capacity") else None
        self._of(capacity).check(capacity)

    def on_peer(self, peer: Peer) -> None:
        """A worker group registered."""
        self._of(peer.capacity).on_peer(peer)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A worker group is gone."""
        self._of(peer.capacity).on_peer_lost(peer, reason)

    def on_heartbeat(self, peer: Peer) -> None:
        """A worker group lives."""
        self._of(peer.capacity).on_heartbeat(peer)

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """A step's result."""
        self._of(peer.capacity).on_message(peer, message, frames)

    def _of(self, capacity: control.Capacity | None) -> Workers:
        return self._embedding if embed_messages.embeds(capacity) else self._generating
