"""The thread that computes: plans in, results out, strictly in order. Part of the shell.

torch and the kernels let go of the interpreter while they compute, so the event loop runs meanwhile.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from headrace.telemetry import logs
from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import StepPlan
from services.worker.embed_runner import EmbedRunner
from services.worker.runner import Runner

log = logs.get_logger()

STOP_WAIT_S: Final = 5.0
_TOLD_LATER_S: Final = 0.002
"""More than a step takes from the end of the one before to its kernels."""


@dataclass(frozen=True, slots=True)
class Job:
    """A plan on its way; `life` is the acquaintance with the scheduler that it belongs to."""

    plan: StepPlan
    token_ids: npt.NDArray[np.int32] | None
    life: int
    received_ns: int


class ComputeThread:
    """Owns the runner: loads it, and computes what is put in its queue, in order. Callbacks run on the event loop.

    Args:
        make_runner: Loads; called on the thread.
        on_result: Called with each job, its result and its frames.
        on_error: Called with what ended the thread.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        on_result: Callable[[Job, StepResult, list[bytes]], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.runner: Runner | None = None
        self.idle_ns = 0
        """Time between steps in which sequences were held and there was nothing to compute."""
        self._make_runner = make_runner
        self._on_result = on_result
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._is_loaded: asyncio.Future[None] = self._loop.create_future()
        # Bounded by the link: the scheduler has at most a few plans under way.
        self._jobs: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._untold: deque[tuple[Job, StepResult, list[bytes]]] = deque()
        # A daemon, so that a step that hangs cannot hold up the end of the process.
        # In this context, so that its log lines say whose they are.
        in_context = contextvars.copy_context().run
        self._thread = threading.Thread(target=in_context, args=(self._run,), name="compute", daemon=True)

    async def start(self) -> Runner:
        """Load the runner; raises what loading raises."""
        self._thread.start()
        await self._is_loaded
        assert self.runner is not None
        return self.runner

    def submit(self, job: Job) -> None:
        """Compute a plan after all before it."""
        self._jobs.put(job)

    def warm_up(self) -> None:
        """Have the runner try its kernels, before all later plans. It takes no longer than joining a scheduler."""
        self._jobs.put(self._warm_up)

    def reset(self) -> None:
        """Forget every sequence, after all plans before."""
        if self.runner is not None:
            self._jobs.put(self.runner.reset)

    async def stop(self) -> None:
        """End after the step under way; a step that takes too long is left to the end of the process."""
        if self._thread.is_alive():
            self._jobs.put(None)
            await self._loop.run_in_executor(None, self._thread.join, STOP_WAIT_S)

    def _run(self) -> None:
        try:
            self.runner = self._make_runner()
        except Exception as error:  # noqa: BLE001 - whatever it is, the event loop raises it
            self._call(self._is_loaded.set_exception, error)
            return
        self._call(self._is_loaded.set_result, None)
        idle_since_ns: int | None = None
        try:
            while (job := self._jobs.get()) is not None:
                if isinstance(job, Job):
                    if idle_since_ns is not None:
                        self.idle_ns += time.monotonic_ns() - idle_since_ns
                    started_unix_ns = time.time_ns()
                    result = self.runner.step(job.plan, job.token_ids)
                    result.started_unix_ns = started_unix_ns
                    result.finished_unix_ns = time.time_ns()
                    idle_since_ns = time.monotonic_ns() if self.runner.num_sequences else None
                    frames = [self.runner.take_vectors()] if isinstance(self.runner, EmbedRunner) else []
                    self._tell(job, result, frames)
                else:
                    job()
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the process
            self._call(self._on_error, error)

    def _tell(self, job: Job, result: StepResult, frames: list[bytes]) -> None:
        """Have the loop told of a result, in order; at once where somebody waits for it.

        Its thread and this one share the interpreter: the next step waits for what it does now. Where that step is here already,
        and the result only says that prompts go on, it is told when that step is being computed.
        """
        self._untold.append((job, result, frames))
        if frames or result.slots or result.failed_slots or self._jobs.empty():
            self._call(self._tell_all)
        else:
            self._call(self._loop.call_later, _TOLD_LATER_S, self._tell_all)

    def _tell_all(self) -> None:
        while self._untold:
            self._on_result(*self._untold.popleft())

    def _warm_up(self) -> None:
        assert self.runner is not None
        begun_ns = time.monotonic_ns()
        self.runner.warm_up()
        log.info("model.warmed_up", warm_up_s=round((time.monotonic_ns() - begun_ns) / 1e9, 3))

    def _call(self, callback: Callable[..., Any], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)
