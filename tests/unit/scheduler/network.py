"""The scheduler's service among the ends of its links, in memory: a router, workers on paper, detokenizers."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headrace.service import ServiceContext
from headrace.telemetry.traces import Tracer
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import worker_pb2 as worker
from headrace.wire import topology
from headrace.wire.envelope import int32_array
from headrace.wire.fake import FakeNetwork, FakeWire
from headrace.wire.link import Wire
from headrace.wire.session import Peer
from services.scheduler.config import Settings
from services.scheduler.service import SchedulerService
from services.scheduler.step_plan import StepPlan
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import FakeWorker, next_token

VOCAB_SIZE = 50


@dataclass
class Entry:
    """A new sequence as the worker's message tells of it."""

    slot: int
    tokens: array[int]
    num_reused_tokens: int
    max_num_tokens: int
    max_num_drafts: int


class Recorder:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.messages: list[tuple[Any, list[memoryview]]] = []

    def on_peer(self, peer: Peer) -> None:
        self.peers[peer.incarnation] = peer

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        self.peers.pop(peer.incarnation, None)

    def on_heartbeat(self, peer: Peer) -> None:
        self.peers[peer.incarnation] = peer

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        self.messages.append((message, frames))

    def bodies(self, arm: str) -> list[Any]:
        """Bodies of one kind, in order of arrival."""
        return [getattr(message, arm) for message, _ in self.messages if message.WhichOneof("body") == arm]


class WorkerEnd(Recorder):
    """A worker that answers at once, unless it is held."""

    def __init__(self, wire: Wire | FakeWire, scheduler_address: str, capacity: control.Capacity) -> None:
        super().__init__()
        self.wire = wire
        pool = capacity.pools[0] if capacity.pools else control.PagePoolInfo(num_pages=1, page_size=1)
        self._capacity = builders.capacity(
            num_pages=pool.num_pages,
            page_size=pool.page_size,
            max_num_seqs=capacity.max_num_seqs,
            max_num_batched_tokens=capacity.max_num_batched_tokens,
            vocab_size=VOCAB_SIZE,
        )
        self.fake = FakeWorker(self._capacity)
        self.is_held = False
        # How long it says that each token of a step took.
        self.token_ns = 0
        # Fails the first row of the next result with this reason.
        self.fail_next: scheduler.RowError | None = None
        self._held: list[tuple[Peer, worker.StepPlan, list[memoryview]]] = []
        self._num_rows = 0
        register = control.Register(role=control.ROLE_WORKER, instance=wire.identity.instance, capacity=capacity)
        self.back = wire.dial(topology.SCHEDULER_BACKPLANE, [scheduler_address], self, register=lambda: register)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        super().on_peer_lost(peer, reason)
        # As the real one, it forgets every sequence.
        self.fake = FakeWorker(self._capacity)
        self._held.clear()

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        super().on_message(peer, message, frames)
        self._held.append((peer, message.step_plan, frames))
        if not self.is_held:
            self.go_on()

    def go_on(self) -> None:
        """Answer what has come."""
        self.is_held = False
        while self._held:
            self._answer(*self._held.pop(0))

    def _answer(self, peer: Peer, body: worker.StepPlan, frames: list[memoryview]) -> None:
        entries: list[Any] = []
        tokens = array("i", int32_array(frames[0]).tolist()) if frames else array("i")
        for new in body.new_sequences:
            entries.append(Entry(new.slot, tokens[: new.num_tokens], new.num_cached_tokens, new.max_num_tokens, new.max_num_drafts))
            tokens = tokens[new.num_tokens + new.num_foretold_tokens :]
        assert not tokens, "the frame holds more tokens than the new sequences"
        self._num_rows = self._num_rows if body.same_rows else len(body.row_slots)
        plan = StepPlan(
            step_id=body.step_id,
            freed_slots=list(body.freed_slots),
            new_sequences=entries,
            page_slots=list(body.page_slots),
            num_new_pages=list(body.num_new_pages),
            new_pages=list(body.new_pages),
            row_slots=list(body.row_slots),
            row_num_new_tokens=list(body.row_num_new_tokens),
            same_rows=body.same_rows,
            num_rows=self._num_rows,
            num_tokens=sum(body.row_num_new_tokens) or self._num_rows,
        )
        result = self.fake.apply(plan)
        if result is not None:
            answer = scheduler.StepResult(
                step_id=result.step_id,
                slots=result.slots,
                token_ids=result.token_ids,
                num_tokens=result.num_tokens,
                started_unix_ns=1,
                finished_unix_ns=1 + self.token_ns * plan.num_tokens,
            )
            if self.fail_next is not None:
                answer.failed_slots.append(answer.slots.pop(0))
                answer.failed_reasons.append(self.fail_next)
                del answer.token_ids[0]
                self.fail_next = None
            peer.send("step_result", answer)


class DetokenizerEnd(Recorder):
    """A detokenizer that keeps tokens by stream."""

    def __init__(self, wire: Wire | FakeWire, address: str) -> None:
        super().__init__()
        self.wire = wire
        self.address = wire.bind(topology.DETOKENIZER_BACKPLANE, address, self).address

    @property
    def target(self) -> scheduler.DetokenizerTarget:
        """How a request names it."""
        return scheduler.DetokenizerTarget(address=self.address, incarnation=self.wire.incarnation)

    def stream(self, stream_id: int) -> tuple[dict[int, int], int]:
        """Tokens by position, and the finish reason, of a stream."""
        tokens: dict[int, int] = {}
        finish = 0
        for batch in self.bodies("token_batch"):
            start = 0
            for index, found in enumerate(batch.stream_ids):
                count = batch.num_tokens[index] if batch.num_tokens else 1
                if found == stream_id:
                    tokens |= {batch.first_positions[index] + n: batch.token_ids[start + n] for n in range(count)}
                    finish = finish or (batch.finish_reasons[index] if batch.finish_reasons else 0)
                start += count
        return tokens, finish


@dataclass
class World:
    """All of it."""

    network: FakeNetwork
    service: SchedulerService
    router: Recorder
    router_wire: Any
    scheduler_wire: FakeWire
    detokenizer: DetokenizerEnd
    context: ServiceContext
    workers: list[WorkerEnd] = field(default_factory=list)

    @classmethod
    async def make(cls, run_directory: Path, *, tracer: Tracer | None = None, **settings: Any) -> World:
        """Everything but workers, acquainted."""
        network = FakeNetwork()
        router_wire = network.wire("router", "router-0")
        router = Recorder()
        router_wire.bind(topology.ROUTER_BACKPLANE, "fake://router", router)
        detokenizer = DetokenizerEnd(network.wire("detokenizer", "detokenizer-0"), "fake://detokenizer-0")
        wire = network.wire("scheduler", "scheduler-0")
        context = ServiceContext.for_test("scheduler", wire, run_directory=run_directory)
        context.bind_address = lambda backplane: "fake://scheduler"  # type: ignore[method-assign]
        context.dial_targets = lambda backplane: ["fake://router"]  # type: ignore[method-assign]
        context.tracer = tracer or context.tracer
        service = SchedulerService(context, Settings(**settings))
        await service.start()
        world = cls(network, service, router, router_wire, wire, detokenizer, context)
        await world.settle()
        return world

    async def settle(self) -> None:
        """Deliver until nothing moves, timers aside."""
        for _ in range(400):
            before = sum(len(end.messages) for end in (self.router, self.detokenizer, *self.workers))
            self.network.settle()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self.network.settle()
            if before == sum(len(end.messages) for end in (self.router, self.detokenizer, *self.workers)):
                return
        raise AssertionError("it does not come to rest")

    async def advance(self, seconds: float) -> None:
        """Let the links' time pass: heartbeats, leases."""
        self.network.advance(seconds)
        await self.settle()

    async def join(self, instance: str = "worker-0", **changes: Any) -> WorkerEnd:
        """A worker joins."""
        end = WorkerEnd(self.network.wire("worker", instance), "fake://scheduler", capacity(**changes))
        self.workers.append(end)
        await self.settle()
        return end

    def scheduler_peer(self) -> Peer:
        """The scheduler as the router sees it."""
        return next(iter(self.router.peers.values()))

    async def submit(
        self, request_id: str = "r1", tokens: Iterable[int] = (1, 2, 3), *, stream_id: int = 1, **changes: Any
    ) -> None:
        """The router submits."""
        known = list(tokens)
        body = submit_body(request_id, known, stream_id=stream_id, **({"detokenizer": self.detokenizer.target} | changes))
        self.scheduler_peer().send("submit", body, [np.array(known, dtype=np.int32)])
        await self.settle()

    def rejections(self) -> dict[str, common.ErrorDetail]:
        """Errors the router was told, by request."""
        return {rejected.request_id: rejected.error for rejected in self.router.bodies("rejected")}


def capacity(*, num_pages: int = 64, page_size: int = 4, pool: str = "full", **changes: Any) -> control.Capacity:
    """What a worker registers with."""
    fields: dict[str, Any] = {
        "model": common.ModelInfo(name=builders.MODEL, max_model_len=128),
        "pools": [control.PagePoolInfo(name=pool, num_pages=num_pages, page_size=page_size)],
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "num_ranks": 1,
        "work_kinds": [control.WORK_KIND_GENERATE],
        "vocab_size": VOCAB_SIZE,
    }
    return control.Capacity(**(fields | changes))


def submit_body(request_id: str, tokens: list[int], *, stream_id: int = 1, **changes: Any) -> scheduler.Submit:
    """A request for 8 tokens; `changes` are fields of Submit or of its header."""
    work = common.WorkHeader(
        request_id=request_id,
        traceparent=changes.pop("traceparent", ""),
        deadline_unix_ns=changes.pop("deadline_unix_ns", 0),
        enqueued_unix_ns=1,
    )
    fields: dict[str, Any] = {
        "model": builders.MODEL,
        "num_tokens": len(tokens),
        "sampling": common.SamplingParams(temperature=0.0),
        "stopping": common.StoppingParams(max_tokens=8),
    }
    return scheduler.Submit(work=work, stream_id=stream_id, **(fields | changes))


def outputs(prompt: list[int], num_tokens: int) -> dict[int, int]:
    """The output of the workers on paper, by position."""
    tokens = array("i", prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, VOCAB_SIZE))
    return dict(enumerate(tokens[len(prompt) :]))
