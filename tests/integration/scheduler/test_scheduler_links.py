"""The scheduler's service on real sockets: ipc links in one event loop, a worker on paper behind one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from headrace.service import ServiceContext
from headrace.v1 import common_pb2 as common
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.wire import topology
from headrace.wire.link import Wire
from services.scheduler.config import Settings
from services.scheduler.service import SchedulerService
from tests.unit.scheduler.network import DetokenizerEnd, Recorder, WorkerEnd, capacity, outputs, submit_body


async def until(condition: Callable[[], bool]) -> None:
    """The test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.005)


class Ends:
    """A scheduler and all it talks to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wires: list[Wire] = []
        self.router = Recorder()

    async def start(self) -> None:
        """Bind, dial, and wait until all know each other."""
        self.wire("router", "router-0").bind(topology.ROUTER_BACKPLANE, f"ipc://{self.directory}/router.sock", self.router)
        detokenizer_wire = self.wire("detokenizer", "detokenizer-0")
        self.detokenizer = DetokenizerEnd(detokenizer_wire, f"ipc://{self.directory}/detokenizer-0.sock")
        context = ServiceContext.for_test("scheduler", self.wire("scheduler", "scheduler-0"), run_directory=self.directory)
        self.service = SchedulerService(context, Settings())
        await self.service.start()
        self.worker = await self.join("worker-0")

    async def join(self, instance: str) -> WorkerEnd:
        """A worker joins."""
        num_lanes = self.service.load().num_lanes
        address = f"ipc://{self.directory}/scheduler.sock"
        worker = WorkerEnd(self.wire("worker", instance), address, capacity(num_pages=256, max_num_batched_tokens=256))
        await until(lambda: self.service.load().num_lanes == num_lanes + 1 and bool(self.router.peers))
        return worker

    def wire(self, role: str, instance: str) -> Wire:
        """A process life."""
        wire = Wire(role=role, instance=instance, registry=CollectorRegistry())
        self.wires.append(wire)
        return wire

    def submit(self, request_id: str, tokens: list[int], *, stream_id: int, max_tokens: int) -> None:
        """A router's request."""
        stopping = common.StoppingParams(max_tokens=max_tokens)
        body = submit_body(request_id, tokens, stream_id=stream_id, detokenizer=self.detokenizer.target, stopping=stopping)
        next(iter(self.router.peers.values())).send("submit", body, [np.array(tokens, dtype=np.int32)])


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[Ends]:
    ends = Ends(tmp_path)
    await ends.start()
    yield ends
    await ends.service.stop()
    for wire in ends.wires:
        await wire.close()


async def test_many_requests_come_out_whole(ends: Ends) -> None:
    for index in range(1, 41):
        ends.submit(f"r{index}", [index] * index, stream_id=index, max_tokens=index)
    await until(lambda: all(ends.detokenizer.stream(index)[1] for index in range(1, 41)))
    for index in range(1, 41):
        tokens, finish = ends.detokenizer.stream(index)
        prompt = [index % 50] * index
        assert (tokens, finish) == (outputs(prompt, index), common.FINISH_REASON_LENGTH)
    assert len(ends.router.bodies("accepted")) == 40
    await until(lambda: not ends.worker.fake.held)


async def test_requests_outlive_their_worker(ends: Ends) -> None:
    for index in range(1, 5):
        ends.submit(f"r{index}", [index] * 3, stream_id=index, max_tokens=60)
    await until(lambda: len(ends.worker.messages) > 5)
    ends.worker.is_held = True
    await ends.worker.wire.close("killed")
    ends.wires.remove(ends.worker.wire)  # type: ignore[arg-type]
    await until(lambda: ends.service.not_ready_reason() == "no lanes")
    await ends.join("worker-1")
    await until(lambda: all(ends.detokenizer.stream(index)[1] for index in range(1, 5)))
    for index in range(1, 5):
        assert ends.detokenizer.stream(index)[0] == outputs([index] * 3, 60)


async def test_an_abort_frees_the_worker(ends: Ends) -> None:
    ends.worker.is_held = True
    ends.submit("r1", [1, 2], stream_id=1, max_tokens=60)
    await until(lambda: bool(ends.worker.messages))
    next(iter(ends.router.peers.values())).send("abort", scheduler.Abort(request_ids=["r1"]))
    await until(lambda: ends.service.core.num_requests == 0)
    ends.worker.go_on()
    await until(lambda: not ends.worker.fake.held)
