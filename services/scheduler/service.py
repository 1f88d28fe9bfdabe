"""The scheduler's shell: carries messages between its links and the core, and tells the core the time.

Three links: routers are dialled and send requests; workers dial and get plans; detokenizers are dialled as requests name them.
Nothing is polled: a plan is made when work or a result arrives, a timer runs only for the next deadline, and what a full queue
refused is sent again with the heartbeat that shows its peer alive.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from headrace.errors import HeadraceError, OverloadedError, ProtocolError, ReplicaDeadError
from headrace.service import ServiceContext
from headrace.telemetry import logs
from headrace.telemetry.metrics import SchedulerMetrics
from headrace.telemetry.traces import Context
from headrace.v1 import control_pb2 as control
from headrace.v1 import router_pb2 as router
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import worker_pb2 as worker
from headrace.v1.common_pb2 import ModelInfo
from headrace.wire import topology
from headrace.wire.link import TIMER_EARLY_NS, Back, Front
from headrace.wire.session import Peer
from services.scheduler import messages
from services.scheduler.admission import check_lane
from services.scheduler.cache_feed import CacheFeed
from services.scheduler.config import Settings
from services.scheduler.deadline_timer import DeadlineTimer
from services.scheduler.embed_desk import EmbedDesk, WorkerSwitch
from services.scheduler.gauges import Gauges
from services.scheduler.lane import Lane, StepRules
from services.scheduler.lanes import Lanes
from services.scheduler.outbox import Outbox, Target
from services.scheduler.policies.registry import POLICIES
from services.scheduler.prefill_delayer import DelayerLimits
from services.scheduler.scheduler import Ending, Scheduler
from services.scheduler.sequence import Sequence
from services.scheduler.sequence_trace import SequenceTrace
from services.scheduler.step_pacer import StepPacer
from services.scheduler.token_fanout import StreamBatch
from services.scheduler.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from headrace.wire.fake import FakeBack, FakeFront

log = logs.get_logger()


class _Hub(Protocol):
    """What the links need of the service."""

    core: Scheduler
    context: ServiceContext
    metrics: SchedulerMetrics
    embeddings: EmbedDesk
    is_draining: bool
    goes_by_priority: bool

    def wake(self) -> None:
        """Plan and carry out, once, after the messages that have arrived together."""

    def lanes_changed(self) -> None:
        """Tell the routers what can be served now."""


class RouterLink:
    """Requests in, acceptances and rejections out."""

    def __init__(self, hub: _Hub, detokenizers: DetokenizerLink) -> None:
        self._hub = hub
        self._detokenizers = detokenizers
        self._unsent: dict[int, deque[router.Rejected]] = {}
        self._peers: dict[int, Peer] = {}
        self._caches = CacheFeed(hub.core.lanes)

    def on_peer(self, peer: Peer) -> None:
        """A router accepted us."""
        self._peers[peer.incarnation] = peer
        self._hub.embeddings.mail.on_peer(peer)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A router is gone, and with it everyone who waited for its requests."""
        self._hub.embeddings.mail.on_peer_lost(peer)
        self._hub.embeddings.core.abort_owner(peer.incarnation)
        self._peers.pop(peer.incarnation, None)
        self._unsent.pop(peer.incarnation, None)
        self._hub.core.abort_owner(peer.incarnation, time.monotonic_ns())
        self._caches.unsubscribe(peer.incarnation)
        self._hub.wake()

    def on_heartbeat(self, peer: Peer) -> None:
        """Rejections, vectors and news of caches that a full queue refused go again."""
        self._hub.embeddings.mail.send(peer.incarnation)
        self.tell_caches()
        unsent = self._unsent.pop(peer.incarnation, None)
        while unsent:
            rejected = unsent.popleft()
            self.reject(peer.incarnation, rejected)
            if peer.incarnation in self._unsent:
                self._unsent[peer.incarnation].extend(unsent)
                return

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """A request, or news about one."""
        arm = message.WhichOneof("body")
        if arm == "submit":
            self._on_submit(peer, message.submit, frames)
        elif arm == "abort":
            self._hub.core.abort(message.abort.request_ids, time.monotonic_ns())
            self._hub.embeddings.core.abort(message.abort.request_ids)
        elif arm == "redirect":
            self._on_redirect(peer, message.redirect)
        elif arm == "flush_cache":
            self._on_flush(peer, message.flush_cache)
        elif arm == "subscribe_cache":
            self._caches.subscribe(peer.incarnation, with_tokens=message.subscribe_cache.with_tokens)
        self._hub.wake()

    def tell_caches(self) -> None:
        """Send what has happened in the lanes' caches to those who want to know."""
        for owner, news in self._caches.collect():
            try:
                self._peers[owner].send("cache_events", *messages.cache_events(news))
            except OverloadedError:
                self._caches.missed(owner, news.lane_id)
            except (KeyError, ReplicaDeadError):
                log.debug("cache_events.undelivered", owner=owner)

    def refuse(self, owner: int, request_id: str, error: HeadraceError) -> None:
        """Tell a router why a request has ended here."""
        self._hub.metrics.rejections.labels(error.code).inc()
        self.reject(owner, router.Rejected(request_id=request_id, error=messages.error_detail(error)))

    def reject(self, owner: int, rejected: router.Rejected) -> None:
        """Tell a router that a request has ended here. A router that is gone does not need to know."""
        peer = self._peers.get(owner)
        if peer is None:
            return
        try:
            peer.send("rejected", rejected)
        except OverloadedError:
            self._unsent.setdefault(owner, deque()).append(rejected)
        except ReplicaDeadError:
            log.debug("rejection.undelivered", request_id=rejected.request_id)

    def _on_submit(self, peer: Peer, submit: scheduler.Submit, frames: list[memoryview]) -> None:
        request_id = submit.work.request_id
        if not request_id:
            raise ProtocolError("submit: no request id")
        try:
            self._take(peer, submit, frames)
        except HeadraceError as error:
            self.refuse(peer.incarnation, request_id, error)
            return
        try:
            peer.send("accepted", router.Accepted(request_id=request_id))
        except (OverloadedError, ReplicaDeadError) as error:
            # Nothing waits for it: the tokens themselves, or a rejection, come later.
            log.debug("acceptance.undelivered", request_id=request_id, error_type=error.code)

    def _take(self, peer: Peer, submit: scheduler.Submit, frames: list[memoryview]) -> None:
        hub = self._hub
        now_ns, now_unix_ns = time.monotonic_ns(), time.time_ns()
        if hub.is_draining:
            raise ReplicaDeadError("scheduler: it is draining; submit the request elsewhere")
        if submit.kind == control.WORK_KIND_EMBED:
            hub.embeddings.submit(peer, submit, frames)
            return
        tokens = messages.check_submit(submit, frames, vocab_size=hub.core.vocab_size)
        target = self._detokenizers.target(submit.detokenizer, now_ns)
        messages.check_priority(submit, is_ordered=hub.goes_by_priority)
        held = messages.sequence(submit, tokens, owner=peer.incarnation, target=target, now_ns=now_ns, now_unix_ns=now_unix_ns)
        parent = Context(submit.work.traceparent, submit.work.tracestate)
        held.trace = SequenceTrace(hub.context.tracer, parent, now_unix_ns)
        hub.context.tracer.record_queue(
            topology.ROUTER_SCHEDULER.name,
            parent=parent,
            enqueued_unix_ns=submit.work.enqueued_unix_ns,
            taken_unix_ns=now_unix_ns,
        )
        hub.core.submit(held, now_ns)

    def _on_flush(self, peer: Peer, flush: scheduler.FlushCache) -> None:
        num_pages = sum(lane.kv.flush() for lane in self._hub.core.lanes)
        log.info("cache.flushed", num_pages=num_pages, router=peer.instance)
        try:
            peer.send("cache_flushed", router.CacheFlushed(call_id=flush.call_id, num_pages=num_pages))
        except (OverloadedError, ReplicaDeadError) as error:
            # It waits with a limit, and can ask again.
            log.warning("cache_flushed.undelivered", router=peer.instance, error_type=error.code)

    def _on_redirect(self, peer: Peer, redirect: scheduler.Redirect) -> None:
        try:
            now_ns = time.monotonic_ns()
            target = self._detokenizers.target(redirect.detokenizer, now_ns)
            self._hub.core.redirect(redirect.request_id, target, from_position=redirect.from_position, now_ns=now_ns)
        except ReplicaDeadError as error:
            self.reject(peer.incarnation, router.Rejected(request_id=redirect.request_id, error=messages.error_detail(error)))


class WorkerSite:
    """A lane and the worker behind it."""

    def __init__(self, peer: Peer, lane: Lane, model: ModelInfo) -> None:
        self.peer = peer
        self.lane = lane
        self.model = model
        self.pacer = StepPacer()
        self.timer: asyncio.TimerHandle | None = None
        # Plans that a full queue refused. The lane holds them for made, so they must go before any other.
        self.unsent: deque[tuple[worker.StepPlan, list[bytes]]] = deque()

    def cancel_timer(self) -> None:
        """No plan is to be made later."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def send(self) -> None:
        """Send the plans that have been made, as far as the queue takes them."""
        while self.unsent:
            body, frames = self.unsent[0]
            try:
                self.peer.send("step_plan", body, frames)
            except OverloadedError:
                return
            except ReplicaDeadError:
                # The loss of the peer follows, and takes the lane with it.
                self.unsent.clear()
                return
            self.unsent.popleft()


class WorkerLink:
    """Plans out, results in. One lane for each worker group."""

    def __init__(self, hub: _Hub) -> None:
        self._hub = hub
        self.sites: dict[int, WorkerSite] = {}

    def check(self, capacity: control.Capacity | None) -> None:
        """Raise why a worker group cannot be a lane now."""
        check_lane(messages.lane_capacity(capacity).model, self._hub.core.lanes, self._hub.core.model)

    def on_peer(self, peer: Peer) -> None:
        """A worker group registered: a lane joins."""
        capacity = messages.lane_capacity(peer.capacity)
        lane = self._hub.core.lane_joined(peer.incarnation, capacity, time.monotonic_ns())
        assert peer.capacity is not None
        self.sites[peer.incarnation] = WorkerSite(peer, lane, peer.capacity.model)
        log.info("lane.joined", worker=peer.instance, num_pages=capacity.num_pages, page_size=capacity.page_size)
        self._hub.lanes_changed()
        self._hub.wake()

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A worker group is gone: its sequences wait for another lane."""
        site = self.sites.pop(peer.incarnation, None)
        if site is None:
            return
        site.cancel_timer()
        log.warning("lane.lost", worker=peer.instance, reason=reason, num_sequences=site.lane.num_running)
        self._hub.core.lane_lost(peer.incarnation, time.monotonic_ns())
        self._hub.lanes_changed()
        self._hub.wake()

    def on_heartbeat(self, peer: Peer) -> None:
        """The worker may be draining, or read again."""
        site = self.sites.get(peer.incarnation)
        if site is not None:
            site.lane.is_draining = peer.is_draining
            site.send()
            self._hub.wake()

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """A step's result: the next plan leaves before its tokens do, so that the worker waits as little as can be."""
        site = self.sites.get(peer.incarnation)
        if site is None:
            raise ProtocolError("a step result of a worker that is no lane")
        hub = self._hub
        now_ns = time.monotonic_ns()
        result = messages.step_result(message.step_result)
        if hub.core.step_result(site.lane, result, now_ns):
            took_ns = site.pacer.on_result(result.duration_ns, now_ns)
            hub.metrics.step_duration.observe(took_ns / 1e9)
        self.plan(site)
        hub.wake()

    def plan(self, site: WorkerSite) -> None:
        """Make and send the plans a lane can have now, and those of lanes that step with it; set a timer for one it has later."""
        group = site.lane.capacity.group
        if not group:
            self._plan_one(site)
            return
        # A pass makes plans for all of them, and nothing may happen to a sequence between plan and message.
        together = [other for other in self.sites.values() if other.lane.capacity.group == group]
        while any(self._make_plan(other) for other in together) or self._hub.core.groups.has_plans(group):
            pass

    def _plan_one(self, site: WorkerSite) -> None:
        site.cancel_timer()
        while not site.unsent and site.pacer.num_under_way < site.lane.max_in_flight:
            now_ns = time.monotonic_ns()
            # A timer that comes a little early finds it time; to wait for the rest would be to look again and again.
            if (delay_ns := site.pacer.next_plan_in_ns(now_ns)) > TIMER_EARLY_NS:
                site.timer = asyncio.get_running_loop().call_later(delay_ns / 1e9, self._on_timer, site)
                return
            if not self._make_plan(site):
                return

    def _make_plan(self, site: WorkerSite) -> bool:
        """Make and send one plan; False when there is none."""
        hub = self._hub
        now_ns = time.monotonic_ns()
        plan = hub.core.plan(site.lane, now_ns)
        if plan is None:
            return False
        works = [self._begin(sequence, now_ns) for sequence in plan.new_sequences]
        site.unsent.append(messages.step_plan(plan, works))
        site.send()
        if plan.num_rows:
            site.pacer.on_plan(plan.num_tokens - plan.num_rows, now_ns)
            hub.metrics.steps.inc()
            hub.metrics.step_tokens.inc(plan.num_tokens)
            hub.metrics.plan_duration.observe((time.monotonic_ns() - now_ns) / 1e9)
        return True

    def stop(self) -> None:
        """Plan nothing further."""
        for site in self.sites.values():
            site.cancel_timer()

    def _on_timer(self, site: WorkerSite) -> None:
        site.timer = None
        self.plan(site)
        self._hub.wake()

    def _begin(self, sequence: Sequence, now_ns: int) -> Any:
        now_unix_ns = time.time_ns()
        assert isinstance(sequence.trace, SequenceTrace)
        if not sequence.was_scheduled:
            sequence.was_scheduled = True
            self._hub.metrics.queue_wait.observe((now_ns - sequence.queued_ns) / 1e9)
        context = sequence.trace.begin_run(sequence, now_unix_ns)
        return messages.work_header(sequence, context, now_ns=now_ns, now_unix_ns=now_unix_ns)


class DetokenizerLink:
    """Tokens out, stops in. A detokenizer is dialled when a request names it."""

    def __init__(self, hub: _Hub, settings: Settings) -> None:
        self._hub = hub
        self._idle_ns = int(settings.detokenizer_idle_s * 1e9)
        self._used_ns: dict[str, int] = {}
        self._back: Back | FakeBack | None = None

    @property
    def back(self) -> Back | FakeBack:
        """The connections; there once the service has started."""
        if self._back is None:
            wire = self._hub.context.wire
            self._back = wire.dial(topology.DETOKENIZER_BACKPLANE, [], self, register=self._register)
        return self._back

    def on_peer(self, peer: Peer) -> None:
        """A detokenizer is there, or there again: what it has missed goes now."""
        self._flush_at(peer.address)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A detokenizer is gone. Its streams fall behind until their routers name another, or it is back."""
        log.info("detokenizer.lost", detokenizer=peer.instance, reason=reason)

    def on_heartbeat(self, peer: Peer) -> None:
        """What a full queue refused goes again."""
        self._flush_at(peer.address)
        self._drop_idle(time.monotonic_ns())

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """Stop strings were found."""
        if message.WhichOneof("body") == "stop":
            self._hub.core.stop_streams(message.stop.stream_ids, time.monotonic_ns())
            self._hub.wake()

    def target(self, named: scheduler.DetokenizerTarget, now_ns: int) -> Target:
        """The detokenizer a request names, dialled when it is new."""
        self.back.add_target(named.address)
        self._used_ns[named.address] = now_ns
        return self._hub.core.outbox.target(named.address, named.incarnation)

    def deliver(self, batch: StreamBatch) -> None:
        """Send a batch, after whatever its target has missed; keep what cannot go."""
        target = batch.target
        if target.behind or not self._send(batch):
            self._hub.core.outbox.hold(batch)
            self.flush(target)

    def flush(self, target: Target) -> None:
        """Send what a target has missed, if that is possible now."""
        rest = target.rest()
        if rest is not None and self._send(rest):
            self._hub.core.outbox.sent(target)

    def _send(self, batch: StreamBatch) -> bool:
        target = batch.target
        peer = self.back.peer_at(target.address)
        if peer is None or peer.incarnation != target.incarnation:
            return False
        try:
            peer.send("token_batch", messages.token_batch(batch, enqueued_unix_ns=time.time_ns()))
        except (OverloadedError, ReplicaDeadError):
            return False
        return True

    def _flush_at(self, address: str) -> None:
        for target in self._hub.core.outbox:
            if target.address == address:
                self.flush(target)

    def _drop_idle(self, now_ns: int) -> None:
        in_use = {target.address for target in self._hub.core.outbox if not target.is_idle}
        for address in in_use & self._used_ns.keys():
            self._used_ns[address] = now_ns
        for address in [address for address, used_ns in self._used_ns.items() if now_ns - used_ns > self._idle_ns]:
            del self._used_ns[address]
            self.back.remove_target(address)

    def _register(self) -> control.Register:
        return control.Register(role=control.ROLE_SCHEDULER, instance=self._hub.context.instance)


class SchedulerService:
    """The service as its runner sees it."""

    def __init__(self, context: ServiceContext, settings: Settings) -> None:
        self.context = context
        self.metrics = SchedulerMetrics(context.registry)
        self.is_draining = False
        self.goes_by_priority = "priority" in (settings.policy, settings.prefix_cache)
        lanes = Lanes()
        policy = POLICIES[settings.policy](lanes)
        queue = WaitingQueue(policy, max_requests=settings.max_waiting_requests, max_tokens=settings.max_waiting_tokens)
        eviction = None if settings.prefix_cache == "off" else settings.prefix_cache
        outbox = Outbox(linger_s=settings.unsent_linger_s)
        self.core = Scheduler(
            lanes,
            queue,
            outbox,
            eviction,
            rules=StepRules(settings.run_ahead, mixed_step_target_ns=int(settings.mixed_step_target_s * 1e9)),
            preemption_threshold=settings.priority_preemption_threshold if settings.policy == "priority" else None,
            delayer_limits=DelayerLimits(settings.prefill_delay_passes_max, settings.prefill_delay_low_watermark),
        )
        self._gauges = Gauges(self.metrics)
        self._workers = WorkerLink(self)
        self._detokenizers = DetokenizerLink(self, settings)
        self._routers = RouterLink(self, self._detokenizers)
        self.embeddings = EmbedDesk(self, settings, tracer=context.tracer, refuse=self._routers.refuse)
        self._front: Front | FakeFront | None = None
        self._back: Back | FakeBack | None = None
        self._is_stopped = False
        self._wake_handle: asyncio.Handle | None = None
        self._deadline_timer = DeadlineTimer(self._on_deadline)
        self._drained = asyncio.Event()
        self._last_step_unix_ns = 0
        self._num_steps_seen = 0
        self._num_looks_elsewhere = 0

    async def start(self) -> None:
        """Open the links."""
        wire = self.context.wire
        workers = WorkerSwitch(self._workers, self.embeddings)
        address = self.context.bind_address(topology.SCHEDULER_BACKPLANE)
        self._front = wire.bind(topology.SCHEDULER_BACKPLANE, address, workers, admit=workers.admit)
        targets = self.context.dial_targets(topology.ROUTER_BACKPLANE)
        self._back = wire.dial(topology.ROUTER_BACKPLANE, targets, self._routers, register=self._register)

    def not_ready_reason(self) -> str | None:
        """A request needs a lane."""
        return None if len(self.core.lanes) or self.embeddings.core.lanes else "no lanes"

    def load(self) -> control.Load:
        """How busy it is. Asked at each tick, so the gauges follow it, and what has waited too long is given up here."""
        self.core.outbox.drop_lingering(time.monotonic_ns())
        self._check_drained()
        load = self._gauges.update(self.core)
        load.num_running += self.embeddings.num_running
        load.num_waiting += self.embeddings.core.num_waiting
        return load

    def progress(self) -> control.Progress:
        """Whether work moves here. While every lane computes, or there is none, we wait for others and are not stuck."""
        counts = self.core.counts
        if counts.num_steps != self._num_steps_seen:
            self._num_steps_seen = counts.num_steps
            self._last_step_unix_ns = time.time_ns()
        if all(site.lane.in_flight or not site.lane.has_work for site in self._workers.sites.values()):
            self._num_looks_elsewhere += 1
        oldest = self.core.queue.peek()
        return control.Progress(
            num_steps=counts.num_steps + self.embeddings.core.num_steps + self._num_looks_elsewhere,
            last_step_unix_ns=self._last_step_unix_ns,
            oldest_waiting_age_ns=max(0, time.monotonic_ns() - oldest.queued_ns) if oldest is not None else 0,
        )

    def models(self) -> tuple[ModelInfo, ...]:
        """The model of the lanes, with the longest context among them, and those that embed; none while there is no lane."""
        offered = sorted((site.model for site in self._workers.sites.values()), key=lambda model: model.max_model_len)
        return (*offered[-1:], *self.embeddings.models())

    def health(self) -> dict[str, Any]:
        """Details for /health."""
        embedding = self.embeddings.core
        return {
            "num_lanes": len(self.core.lanes) + len(embedding.lanes),
            "num_requests": self.core.num_requests + embedding.num_requests,
        }

    def wake(self) -> None:
        """Plan and carry out, once, after the messages that have arrived together."""
        if self._wake_handle is None and not self._is_stopped:
            self._wake_handle = asyncio.get_running_loop().call_soon(self._on_wake)

    def lanes_changed(self) -> None:
        """Tell the routers at once what can be served now."""
        load = self.load()
        self.context.wire.set_load(load, self.progress(), self.models(), num_lanes=load.num_lanes)
        if self._back is not None:
            self._back.beat_now()

    async def drain(self) -> None:
        """Refuse new requests and wait until those that are held have ended and their output has gone."""
        self.is_draining = True
        if self._back is not None:
            self._back.announce_drain()
        self._check_drained()
        await self._drained.wait()

    async def stop(self) -> None:
        """Do nothing further; the links are closed by the runner."""
        self._is_stopped = True
        self._deadline_timer.set(None)
        self._workers.stop()
        if self._wake_handle is not None:
            self._wake_handle.cancel()

    def _register(self) -> control.Register:
        return control.Register(role=control.ROLE_SCHEDULER, instance=self.context.instance, models=self.models())

    def _on_wake(self) -> None:
        self._wake_handle = None
        for site in list(self._workers.sites.values()):
            self._workers.plan(site)
        self.embeddings.plan()
        self._carry_out()
        deadlines_ns = (self.core.next_deadline_ns(), self.embeddings.core.next_deadline_ns())
        self._deadline_timer.set(min((deadline_ns for deadline_ns in deadlines_ns if deadline_ns is not None), default=None))
        self._check_drained()

    def _carry_out(self) -> None:
        """Send what has come out of the core."""
        outcome = self.core.take_outcome()
        for batch in outcome.batches:
            self._detokenizers.deliver(batch)
        for target in outcome.behind:
            self._detokenizers.flush(target)
        for ending in outcome.endings:
            self._on_ending(ending)
        self._routers.tell_caches()

    def _on_ending(self, ending: Ending) -> None:
        sequence, error = ending.sequence, ending.error
        assert isinstance(sequence.trace, SequenceTrace)
        sequence.trace.end(sequence, time.time_ns(), error.code if error is not None else None)
        if error is not None:
            self.metrics.rejections.labels(error.code).inc()
            detail = messages.error_detail(error)
            self._routers.reject(sequence.owner, router.Rejected(request_id=sequence.request_id, error=detail))

    def _on_deadline(self) -> None:
        now_ns = time.monotonic_ns()
        self.core.expire(now_ns)
        self.embeddings.core.expire(now_ns)
        self.wake()

    def _check_drained(self) -> None:
        num_open = self.core.num_requests + self.embeddings.core.num_requests
        if self.is_draining and not num_open and not self.core.outbox.num_kept:
            self._drained.set()
