"""Bytes and time of a step on the wire: StepPlan, StepResult and TokenBatch.

    python -m bench.micro.step_wire [--json FILE]

At each number of running sequences: `steady`, where nothing changes; `rows`, where one sequence has left since the last plan;
`pages`, where every 16th sequence gets a page; `prefill`, where a prompt of 512 tokens enters beside the others. `build`: from the
core's plan to the message; `send`: to bytes, header included; `read`: from bytes to what the other side works with. Medians in
microseconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.machine import provenance
from headrace.v1 import common_pb2 as common
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import worker_pb2 as worker
from services.scheduler import messages
from services.scheduler.outbox import Target
from services.scheduler.sequence import Sequence, StoppingRules
from services.scheduler.step_plan import StepPlan
from services.scheduler.token_fanout import StreamBatch

NUM_RUNNING: Final = (64, 256, 1024)
CASES: Final = ("steady", "rows", "pages", "prefill")
PROMPT_TOKENS: Final = 512
PAGE_SIZE: Final = 16
NUM_REPEATS: Final = 300

_HEADER: Final = common.Header(sent_unix_ns=1)


def plan_of(case: str, num_running: int) -> StepPlan:
    """A plan as the planner makes it."""
    slots = list(range(num_running))
    plan = StepPlan(step_id=1 << 33, num_rows=num_running, num_tokens=num_running)
    if case == "steady":
        plan.same_rows = True
    elif case == "rows":
        plan.freed_slots = [3]
        plan.row_slots = [slot for slot in slots if slot != 3]
    elif case == "pages":
        plan.same_rows = True
        for slot in slots[::16]:
            plan.add_pages(slot, [slot * 7])
    else:
        new = _sequence(num_running)
        plan.new_sequences = [new]
        plan.add_pages(new.slot, list(range(PROMPT_TOKENS // PAGE_SIZE)))
        plan.row_slots = [*slots, new.slot]
        plan.row_num_new_tokens = [1] * num_running + [PROMPT_TOKENS]
    return plan


def measure(case: str, num_running: int) -> dict[str, Any]:
    """One line of the table."""
    plan = plan_of(case, num_running)
    works = [common.WorkHeader(request_id="0" * 32, traceparent="0" * 55, enqueued_unix_ns=1) for _ in plan.new_sequences]
    slots, tokens = list(range(num_running)), [17] * num_running
    target = Target("tcp://detokenizer:1", 1)
    batch = StreamBatch(target, [], [1 << 60 | slot for slot in slots], [100] * num_running, tokens)
    body, frames = messages.step_plan(plan, works)
    result = scheduler.StepResult(step_id=1 << 33, slots=slots, token_ids=tokens, started_unix_ns=1, finished_unix_ns=2)
    token_batch = messages.token_batch(batch, enqueued_unix_ns=1)
    plan_data = _pack(worker.WorkerInbox, "step_plan", body)
    result_data = _pack(scheduler.SchedulerInbox, "step_result", result)
    batch_data = _pack(detokenizer.DetokenizerInbox, "token_batch", token_batch)
    return {
        "running": num_running,
        "case": case,
        "plan_bytes": len(plan_data) + sum(map(len, frames)),
        "plan_build_us": _median_us(lambda: messages.step_plan(plan, works)),
        "plan_send_us": _median_us(lambda: _pack(worker.WorkerInbox, "step_plan", body)),
        "plan_read_us": _median_us(lambda: _read_plan(plan_data)),
        "result_bytes": len(result_data),
        "result_read_us": _median_us(lambda: messages.step_result(scheduler.SchedulerInbox.FromString(result_data).step_result)),
        "batch_bytes": len(batch_data),
        "batch_send_us": _median_us(
            lambda: _pack(detokenizer.DetokenizerInbox, "token_batch", messages.token_batch(batch, enqueued_unix_ns=1))
        ),
    }


def _pack(inbox: Any, arm: str, body: Any) -> bytes:
    """As a link does: the body into its arm beside a header."""
    data: bytes = inbox(header=_HEADER, **{arm: body}).SerializeToString()
    return data


def _read_plan(data: bytes) -> int:
    """What a worker takes out of a plan."""
    plan = worker.WorkerInbox.FromString(data).step_plan
    slots = (plan.freed_slots, plan.page_slots, plan.row_slots)
    fields = (*slots, plan.num_new_pages, plan.new_pages, plan.row_num_new_tokens)
    return len([np.fromiter(field, dtype=np.int64) for field in fields if field])


def _sequence(slot: int) -> Sequence:
    return Sequence(
        request_id="r",
        stream_id=1,
        owner=1,
        model="m",
        tokens=array("i", range(PROMPT_TOKENS)),
        num_prompt_tokens=PROMPT_TOKENS,
        stopping=StoppingRules(),
        target=Target("", 1),
        sampling=common.SamplingParams(temperature=0.7, top_p=0.9, seed=7),
        slot=slot,
    )


def _median_us(work: Callable[[], object]) -> float:
    times = []
    for _ in range(NUM_REPEATS):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return round(statistics.median(times) / 1e3, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    gc.disable()
    found = [measure(case, num_running) for num_running in NUM_RUNNING for case in CASES]
    print(" ".join(f"{name:>14}" for name in found[0]))
    for line in found:
        print(" ".join(f"{value:>14}" for value in line.values()))
    if options.json:
        options.json.write_text(json.dumps({"provenance": provenance(), "figures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
