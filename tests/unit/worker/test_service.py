"""Goal: the shell keeps plans in order, its life apart from its former ones, and tells of every failure.

Method: the mock runner on its own thread, and a scheduler by hand on a fake network.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from headrace.errors import InvalidRequestError, ModelError, ProtocolError
from headrace.service import ServiceContext
from headrace.telemetry.metrics import WorkerMetrics
from headrace.v1.control_pb2 import Register
from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import StepPlan
from headrace.wire.envelope import int32_frame
from headrace.wire.fake import FakeNetwork, FakeWire
from headrace.wire.session import Peer
from headrace.wire.topology import SCHEDULER_BACKPLANE
from services.worker.config import Settings
from services.worker.service import WorkerService, _count_drafts

Plan = Callable[..., StepPlan]


class Scheduler:
    """What stands at the other end: the lanes that joined, and the results in order."""

    def __init__(self, network: FakeNetwork, instance: str) -> None:
        self.lanes: list[Peer] = []
        self.lost: list[str] = []
        self.results: list[StepResult] = []
        self.refusal = ""
        self.wire = network.wire("scheduler", instance)
        self.wire.bind(SCHEDULER_BACKPLANE, "fake://scheduler", self, admit=self.admit)

    def admit(self, register: Register) -> None:
        if self.refusal:
            raise InvalidRequestError(self.refusal)

    def on_peer(self, peer: Peer) -> None:
        self.lanes.append(peer)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        self.lost.append(reason)

    def on_heartbeat(self, peer: Peer) -> None:
        """Nothing."""

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        self.results.append(message.step_result)


class Stage:
    """A worker with the mock runner, and a scheduler."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.network = FakeNetwork()
        self.scheduler = Scheduler(self.network, "scheduler-0")
        self.wire: FakeWire = self.network.wire("worker", "worker-0")
        self.context = ServiceContext.for_test(
            "worker",
            self.wire,
            run_directory=directory,
            model__name=str(directory),
            wire__scheduler_targets=["fake://scheduler"],
        )
        self.errors: list[BaseException] = []
        self.context.fail = self.errors.append
        values: dict[str, Any] = {"runner": "mock", "max_num_seqs": 8, "page_size": 4, "mock_step_s": 0, "mock_token_s": 0}
        self.service = WorkerService(self.context, Settings(**(values | changes)))

    async def start(self) -> None:
        await self.service.start()
        self.network.settle()

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            await asyncio.sleep(0.001)
            self.network.settle()

    def send(self, plan: StepPlan, *token_ids: int) -> None:
        frames = [int32_frame(np.array(token_ids))] if token_ids else []
        self.scheduler.lanes[-1].send("step_plan", plan, frames)
        self.network.settle()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = Stage(tmp_path)
    yield made
    await made.service.stop()


async def test_worker_offers_its_capacity_and_is_ready_once_it_has_joined(stage: Stage) -> None:
    assert stage.service.not_ready_reason() == "the model is being loaded"
    await stage.start()
    assert stage.service.not_ready_reason() is None
    capacity = stage.scheduler.lanes[0].capacity
    assert capacity is not None
    assert (capacity.max_num_seqs, capacity.vocab_size, capacity.num_ranks) == (8, 100, 1)
    assert (capacity.pools[0].name, capacity.pools[0].page_size) == ("full", 4)
    assert capacity.model.max_model_len == 64


async def test_worker_that_is_refused_says_why_it_is_not_ready(stage: Stage) -> None:
    stage.scheduler.refusal = "another model is here"
    await stage.start()
    assert stage.service.not_ready_reason() == "another model is here"
    stage.scheduler.refusal = ""
    stage.network.advance(2)
    assert stage.service.not_ready_reason() is None


async def test_plans_are_answered_in_order_and_counted(stage: Stage, plan: Plan) -> None:
    await stage.start()
    stage.send(plan(new={0: 2}, pages={0: [0, 1, 2]}, rows={0: 2}), 5, 6)
    for step_id in range(2, 8):
        stage.send(StepPlan(step_id=step_id, same_rows=True))
    await stage.until(lambda: len(stage.scheduler.results) == 7)
    assert [result.step_id for result in stage.scheduler.results] == list(range(1, 8))
    assert all(list(result.slots) == [0] for result in stage.scheduler.results)
    assert stage.scheduler.results[0].finished_unix_ns >= stage.scheduler.results[0].started_unix_ns > 0
    progress = stage.service.progress()
    assert (progress.num_steps, progress.oldest_waiting_age_ns) == (7, 0)
    assert stage.service.load().num_running == 0
    assert stage.context.registry.get_sample_value("headrace_worker_tokens_total", {"phase": "prefill"}) == 2
    assert stage.context.registry.get_sample_value("headrace_worker_tokens_total", {"phase": "decode"}) == 6


def test_drafts_are_counted_by_outcome_and_length() -> None:
    registry = CollectorRegistry()
    result = StepResult(slots=[4, 5, 6], token_ids=[1, 2, 3, 4, 5], num_tokens=[3, 1, 1], num_drafts=[4, 2, 0])
    _count_drafts(WorkerMetrics(registry), result)
    _count_drafts(WorkerMetrics(registry_of_others := CollectorRegistry()), StepResult(slots=[4], token_ids=[1], num_drafts=[2]))

    def value(name: str, labels: dict[str, str] | None = None) -> float | None:
        return registry.get_sample_value(f"headrace_worker_{name}", labels or {})

    assert value("draft_tokens_total", {"outcome": "accepted"}) == 2
    assert value("draft_tokens_total", {"outcome": "rejected"}) == 4
    assert value("tokens_total", {"phase": "draft"}) == 6
    assert (value("accept_length_tokens_count"), value("accept_length_tokens_sum")) == (2, 4)
    assert value("accept_length_tokens_bucket", {"le": "1.0"}) == 1
    # All wrong: the counts are not sent then.
    assert registry_of_others.get_sample_value("headrace_worker_accept_length_tokens_sum") == 1


async def test_lost_scheduler_takes_its_sequences_with_it(stage: Stage, plan: Plan) -> None:
    await stage.start()
    enter = plan(new={0: 2}, pages={0: [0]}, rows={0: 2})
    stage.send(enter, 5, 6)
    await stage.until(lambda: stage.scheduler.results)
    stage.scheduler.wire.kill()
    stage.network.advance(6.0)
    assert stage.service.not_ready_reason() == "no scheduler has answered yet"
    successor = stage.scheduler = Scheduler(stage.network, "scheduler-0")
    stage.network.advance(1.0)
    assert len(successor.lanes) == 1
    # The same slot and pages are free again; a former life's rows are gone.
    stage.send(StepPlan(step_id=1, same_rows=True))
    stage.send(enter, 5, 6)
    await stage.until(lambda: len(successor.results) == 2)
    assert [list(result.slots) for result in successor.results] == [[], [0]]
    assert stage.errors == []


async def test_unknown_slot_is_answered_and_counted(stage: Stage, plan: Plan) -> None:
    await stage.start()
    stage.send(plan(rows={3: 1}))
    await stage.until(lambda: stage.scheduler.results)
    assert list(stage.scheduler.results[0].failed_slots) == [3]
    count = stage.context.registry.get_sample_value("headrace_worker_row_errors_total", {"reason": "ROW_ERROR_UNKNOWN_SLOT"})
    assert count == 1


@pytest.mark.parametrize("token_ids", [(5,), ()], ids=["short frame", "no frame"])
async def test_plan_without_its_tokens_ends_the_process(stage: Stage, plan: Plan, token_ids: tuple[int, ...]) -> None:
    await stage.start()
    stage.send(plan(new={0: 2}, pages={0: [0]}, rows={0: 2}), *token_ids)
    assert [type(error) for error in stage.errors] == [ProtocolError]


async def test_plan_that_contradicts_the_state_ends_the_process(stage: Stage, plan: Plan) -> None:
    await stage.start()
    stage.send(plan(new={0: 2}, pages={0: [99_999]}, rows={0: 2}), 5, 6)
    await stage.until(lambda: stage.errors)
    assert "page 99999 does not exist" in str(stage.errors[0])


def dropped_results(stage: Stage) -> float:
    count = stage.context.registry.get_sample_value("headrace_worker_dropped_results_total")
    assert count is not None
    return count


async def test_results_wait_for_a_busy_scheduler_and_arrive_in_order(stage: Stage, plan: Plan) -> None:
    await stage.start()
    stage.send(plan(new={0: 2}, pages={0: [0]}, rows={0: 2}), 5, 6)
    stage.send(StepPlan(step_id=2, same_rows=True))
    stage.network.full_towards.add("scheduler-0")
    await stage.until(lambda: stage.service.progress().num_steps == 2)
    assert stage.scheduler.results == []
    stage.network.full_towards.clear()
    await stage.until(lambda: len(stage.scheduler.results) == 2)
    assert [result.step_id for result in stage.scheduler.results] == [1, 2]
    assert (stage.errors, dropped_results(stage)) == ([], 0)


async def test_results_for_a_scheduler_that_vanished_are_dropped_and_the_worker_joins_its_successor(
    stage: Stage, plan: Plan
) -> None:
    """Goal: the weights outlive the scheduler. Method: it dies with two plans under way; the link refuses what is sent there."""
    await stage.start()
    enter = plan(new={0: 2}, pages={0: [0]}, rows={0: 2})
    stage.send(enter, 5, 6)
    stage.send(StepPlan(step_id=2, same_rows=True))
    stage.scheduler.wire.kill()
    await stage.until(lambda: stage.service.progress().num_steps == 2)
    assert stage.errors == []
    successor = stage.scheduler = Scheduler(stage.network, "scheduler-0")
    stage.network.advance(6.0)
    assert len(successor.lanes) == 1
    assert dropped_results(stage) == 2
    stage.send(enter, 5, 6)
    await stage.until(lambda: successor.results)
    assert [list(result.slots) for result in successor.results] == [[0]]
    assert stage.errors == []


async def test_drain_waits_for_the_last_sequence(stage: Stage, plan: Plan) -> None:
    await stage.start()
    stage.send(plan(new={0: 2}, pages={0: [0]}, rows={0: 2}), 5, 6)
    await stage.until(lambda: stage.scheduler.results)
    draining = asyncio.create_task(stage.service.drain())
    await stage.until(lambda: stage.scheduler.lanes[0].is_draining)
    assert not draining.done()
    stage.send(StepPlan(step_id=2, freed_slots=[0]))
    await stage.until(draining.done)
    draining.result()


async def test_missing_model_stops_the_start(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with pytest.raises(ModelError, match="headrace models pull"):
        await stage.service.start()
    await stage.service.stop()
