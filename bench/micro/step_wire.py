"""Bytes and time of a step on the wire: StepPlan, StepResult and TokenBatch.

    python -m bench.micro.step_wire [--json FILE] [--steps N]

The scheduler's core makes the plans, and the worker's slot state takes them in. At each number of running sequences: `steady`,
where nothing changes; `rows`, where one sequence has left; `pages`, where every 16th sequence gets a page; `prefill`, where a
prompt of 512 tokens enters beside the others.

`build`: from what the sender works with to the message; `seal`: from the message to the bytes of a link, header included;
`read`: from the bytes to what the receiver works with. `turn`: plan out and result back over a real ipc:// pair, all of these
included, both ends in one thread, no model. Median / 99th percentile in microseconds; bytes are medians, without ZeroMQ's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from bench.machine import provenance
from headrace.v1 import common_pb2 as common
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import worker_pb2 as worker
from headrace.wire.envelope import int32_array, seal, unseal
from services.scheduler import messages
from services.scheduler.lane import LaneCapacity
from services.scheduler.lanes import Lanes
from services.scheduler.outbox import Outbox
from services.scheduler.policies.registry import POLICIES
from services.scheduler.scheduler import Scheduler
from services.scheduler.sequence import Sequence, StoppingRules
from services.scheduler.step_plan import StepPlan
from services.scheduler.token_fanout import StreamBatch
from services.scheduler.waiting_queue import WaitingQueue
from services.worker.batch_inputs import BatchInputs, Limits
from services.worker.entering import num_entering_tokens
from services.worker.runner import step_result

NUM_RUNNING: Final = (64, 256, 1024)
CASES: Final = ("steady", "rows", "pages", "prefill")
PARTS: Final = (
    "plan_build",
    "plan_seal",
    "plan_read",
    "result_build",
    "result_seal",
    "result_read",
    "batch_build",
    "batch_seal",
    "batch_read",
    "turn",
)
PROMPT_TOKENS: Final = 512
PAGE_SIZE: Final = 16
VOCAB_SIZE: Final = 50_000
NUM_STEPS: Final = 300
MAX_STEPS: Final = 1500
"""Of one load; the sequences would reach the end of their context soon after."""

# As a link sets them: random numbers of 63 bits.
_SENDER: Final = 0x5A5A_0000_1234_5679
_RECIPIENT: Final = 0x2B2B_0000_4321_8765
_SAMPLING: Final = common.SamplingParams(temperature=0.7, top_p=0.9, seed=7)


class Watch:
    """Times of the parts of each step, by case."""

    def __init__(self) -> None:
        self.ns: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step."""
        started = time.perf_counter_ns()
        yield
        self.ns[name] = time.perf_counter_ns() - started


class Pair:
    """A ROUTER and a DEALER joined by ipc://, as scheduler and worker are."""

    def __init__(self, directory: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.front, self.back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        self.front.bind(f"ipc://{directory}/step")
        self.back.setsockopt(zmq.ROUTING_ID, b"worker")
        self.back.connect(f"ipc://{directory}/step")
        # The front knows the back from the first message on.
        self.back.send(b"")
        self.front.recv_multipart()

    def close(self) -> None:
        """Close both ends."""
        self._context.destroy(linger=0)


class Bench:
    """A core with one lane, the slot state of a worker, and the sockets between."""

    def __init__(self, num_running: int, pair: Pair, *, is_spread: bool) -> None:
        self.pair = pair
        self.num_running = num_running
        lanes = Lanes()
        self.core = Scheduler(
            lanes, WaitingQueue(POLICIES["fcfs"](lanes), max_requests=10**6, max_tokens=10**9), Outbox(linger_s=30)
        )
        limits = Limits(
            max_model_len=2048,
            vocab_size=VOCAB_SIZE,
            num_pages=(num_running + 1) * 128,
            page_size=PAGE_SIZE,
            max_num_seqs=num_running + 1,
            # All prompts in one step, so that those of one length get their pages together.
            max_num_batched_tokens=num_running * 160 + PROMPT_TOKENS,
        )
        capacity = LaneCapacity(model="m", **dataclasses.asdict(limits))
        self.lane = self.core.lane_joined(1, capacity, 0)
        self.inputs = BatchInputs(limits)
        self.num_submitted = 0
        self.watch = Watch()
        self.plan = StepPlan(0)
        self.plan_bytes = self.result_bytes = self.batch_bytes = 0
        for index in range(num_running):
            self.submit(128 + (index % PAGE_SIZE if is_spread else 0))
        for _ in range(3):
            self.step()

    def submit(self, num_tokens: int) -> str:
        """Add a request whose prompt is its own; gives its id."""
        self.num_submitted += 1
        number = self.num_submitted
        request_id = f"{number:032x}"
        tokens = array("i", [(number * 7919 + index * 31) % VOCAB_SIZE for index in range(num_tokens)])
        self.core.submit(
            Sequence(
                request_id=request_id,
                stream_id=1 << 60 | number,
                owner=1,
                model="m",
                tokens=tokens,
                num_prompt_tokens=num_tokens,
                stopping=StoppingRules(),
                target=self.core.outbox.target("tcp://detokenizer:1", 1),
                sampling=_SAMPLING,
            ),
            0,
        )
        return request_id

    def step(self) -> None:
        """Plan a step, carry it to the worker and back, and send its tokens."""
        plan = self.core.plan(self.lane, 0)
        assert plan is not None
        self.plan = plan
        now = time.time_ns()
        works = [
            common.WorkHeader(request_id=new.request_id, traceparent="0" * 55, enqueued_unix_ns=now) for new in plan.new_sequences
        ]
        self.watch.ns.clear()
        part = self.watch.part
        started = time.perf_counter_ns()
        with part("plan_build"):
            body, frames = messages.step_plan(plan, works)
        with part("plan_seal"):
            data = _seal(worker.WorkerInbox, "step_plan", body)
        self.pair.front.send_multipart([b"worker", data, *frames])
        parts = self.pair.back.recv_multipart()
        with part("plan_read"):
            received = unseal(worker.WorkerInbox, parts[0]).step_plan
            token_ids = int32_array(parts[1], count=num_entering_tokens(received)) if parts[1:] else None
            _arrays_of(received)
        out_ns = time.perf_counter_ns() - started
        inputs = self.inputs.lay_out(self.inputs.take(received, token_ids))
        sampled = np.full(len(inputs.sampled.slots), 30_000, dtype=np.int64)
        is_finite = np.ones(len(sampled), dtype=np.bool_)
        tokens = self.inputs.commit(inputs, sampled, is_finite)
        resumed = time.perf_counter_ns()
        with part("result_build"):
            answer = step_result(received, tokens, inputs.unknown_slots)
            answer.started_unix_ns = answer.finished_unix_ns = now
        with part("result_seal"):
            reply = _seal(scheduler.SchedulerInbox, "step_result", answer)
        self.pair.back.send_multipart([reply])
        _, back = self.pair.front.recv_multipart()
        with part("result_read"):
            result = messages.step_result(unseal(scheduler.SchedulerInbox, back).step_result)
        self.watch.ns["turn"] = out_ns + time.perf_counter_ns() - resumed
        self.core.step_result(self.lane, result, 0)
        (batch,) = self.core.take_outcome().batches
        self.plan_bytes, self.result_bytes = sum(map(len, parts)), len(back)
        self.batch_bytes = self._carry_tokens(batch, now)

    def _carry_tokens(self, batch: StreamBatch, now: int) -> int:
        part = self.watch.part
        with part("batch_build"):
            body = messages.token_batch(batch, enqueued_unix_ns=now)
        with part("batch_seal"):
            data = _seal(detokenizer.DetokenizerInbox, "token_batch", body)
        with part("batch_read"):
            read = unseal(detokenizer.DetokenizerInbox, data).token_batch
            _ = list(read.stream_ids), list(read.first_positions), list(read.token_ids), list(read.num_tokens)
            _ = list(read.finish_reasons), list(read.num_stop_tokens), list(read.num_cached_tokens)
        return len(data)

    def case(self) -> str | None:
        """Which case the last plan was; None for one that is several or none of them."""
        plan, num_running = self.plan, self.num_running
        num_grown = len(plan.page_slots) - len(plan.new_sequences)
        if plan.same_rows:
            return {0: "steady", num_running // PAGE_SIZE: "pages"}.get(num_grown)
        if num_grown:
            return None
        if plan.new_sequences:
            return "prefill" if plan.num_rows == num_running + 1 else None
        return "rows" if plan.freed_slots and len(plan.row_slots) == num_running else None


def measure(num_running: int, *, num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    """The lines of the table for one number of running sequences."""
    times: dict[str, dict[str, list[float]]] = {case: {part: [] for part in PARTS} for case in CASES}
    sizes: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for is_spread in (False, True):
        wanted = ("pages",) if is_spread else ("steady", "rows", "prefill")
        with ExitStack() as stack:
            pair = Pair(stack.enter_context(tempfile.TemporaryDirectory(prefix="hr-")))
            stack.callback(pair.close)
            bench = Bench(num_running, pair, is_spread=is_spread)
            gc.collect()
            for index in range(MAX_STEPS):
                if all(len(sizes[case]) >= num_steps for case in wanted):
                    break
                # A prompt enters, is gone two steps later, and a step without change follows.
                if not is_spread and index % 4 == 0:
                    guest = bench.submit(PROMPT_TOKENS)
                elif not is_spread and index % 4 == 2:
                    bench.core.abort([guest], 0)
                bench.step()
                case = bench.case()
                if case is not None and case in wanted and len(sizes[case]) < num_steps:
                    sizes[case].append((bench.plan_bytes, bench.result_bytes, bench.batch_bytes))
                    for name, ns in bench.watch.ns.items():
                        times[case][name].append(ns / 1e3)
    return [_line(case, num_running, times[case], sizes[case]) for case in CASES]


def _line(case: str, num_running: int, times: dict[str, list[float]], sizes: list[tuple[int, int, int]]) -> dict[str, Any]:
    plan_bytes, result_bytes, batch_bytes = (int(statistics.median(column)) for column in zip(*sizes, strict=True))
    line: dict[str, Any] = {
        "case": case,
        "num_running": num_running,
        "num_steps": len(sizes),
        "plan_bytes": plan_bytes,
        "result_bytes": result_bytes,
        "batch_bytes": batch_bytes,
    }
    for name, values in times.items():
        line[f"{name}_us"] = round(statistics.median(values), 1)
        line[f"{name}_us_p99"] = round(statistics.quantiles(values, n=100)[98], 1)
    return line


def _seal(inbox: Any, arm: str, body: Any) -> bytes:
    return seal(inbox, arm, body, sender_incarnation=_SENDER, recipient_incarnation=_RECIPIENT, sent_unix_ns=time.time_ns())


def _arrays_of(plan: Any) -> int:
    """The arrays that a worker makes of a plan's fields, and no more of its work."""
    fields = (plan.freed_slots, plan.page_slots, plan.num_new_pages, plan.new_pages, plan.row_slots, plan.row_num_new_tokens)
    return sum(len(np.fromiter(field, dtype=np.int64)) for field in fields if field)


def main() -> None:
    """Measure all cases, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="steps measured for each case, at most")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    heads = [name.replace("_", " ") for name in PARTS]
    print(f"{'case':8}{'running':>8}{'plan B':>8}{'result B':>9}{'batch B':>8}" + "".join(f"{head:>15}" for head in heads))
    for num_running in NUM_RUNNING:
        for line in measure(num_running, num_steps=arguments.steps):
            rows.append(line)
            cells = (f"{line[f'{name}_us']:.1f} / {line[f'{name}_us_p99']:.0f}" for name in PARTS)
            print(
                f"{line['case']:8}{num_running:>8}{line['plan_bytes']:>8}{line['result_bytes']:>9}{line['batch_bytes']:>8}"
                + "".join(f"{cell:>15}" for cell in cells),
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
