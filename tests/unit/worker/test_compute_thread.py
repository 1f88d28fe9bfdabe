"""Goal: results are told in order, at once where somebody waits for them, and otherwise when the next step runs.

Method: a runner whose steps give what the test says and end when it says so.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import StepPlan
from services.worker import compute_thread
from services.worker.compute_thread import ComputeThread, Job
from services.worker.runner import Runner
from tests.patience import NEVER_S, WAIT_S

GOES_ON: tuple[int, ...] = ()


class StandIn:
    """Each step waits until it may end; the plan's rows are the slots that give tokens."""

    num_sequences = 1

    def __init__(self) -> None:
        self.num_begun = 0
        self.may_end = [threading.Event() for _ in range(3)]

    def step(self, plan: StepPlan, token_ids: Any) -> StepResult:
        self.num_begun += 1
        assert self.may_end[plan.step_id].wait(WAIT_S)
        return StepResult(step_id=plan.step_id, slots=plan.row_slots)


class Bench:
    """A thread with that runner, and what the loop has been told."""

    def __init__(self) -> None:
        self.runner = StandIn()
        self.told: list[int] = []
        self.thread = ComputeThread(
            lambda: cast("Runner", self.runner),
            on_result=lambda job, result, frames: self.told.append(result.step_id),
            on_error=lambda error: pytest.fail(repr(error)),
        )

    def submit(self, *slots_of_steps: tuple[int, ...]) -> None:
        for step_id, slots in enumerate(slots_of_steps):
            self.thread.submit(Job(StepPlan(step_id=step_id, row_slots=slots), None, life=1, received_ns=0))

    async def until(self, condition: Callable[[], bool]) -> None:
        """The test's own timeout bounds it."""
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


@pytest.fixture
async def bench() -> Any:
    made = Bench()
    await made.thread.start()
    yield made
    for event in made.runner.may_end:
        event.set()
    await made.thread.stop()


async def test_that_prompts_go_on_is_told_while_the_next_step_runs(bench: Bench) -> None:
    bench.submit(GOES_ON, (4,))
    bench.runner.may_end[0].set()
    await bench.until(lambda: bench.told == [0])
    bench.runner.may_end[1].set()
    await bench.until(lambda: bench.told == [0, 1])


async def test_that_prompts_go_on_does_not_hold_up_the_next_step_and_comes_before_its_result(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute_thread, "_TOLD_LATER_S", NEVER_S)
    bench.submit(GOES_ON, (4,), GOES_ON)
    bench.runner.may_end[0].set()
    await bench.until(lambda: bench.runner.num_begun == 2)
    await asyncio.sleep(0)
    assert bench.told == []
    bench.runner.may_end[1].set()
    await bench.until(lambda: bench.told == [0, 1])
    # Without a step after it, the scheduler waits to make one.
    bench.runner.may_end[2].set()
    await bench.until(lambda: bench.told == [0, 1, 2])
