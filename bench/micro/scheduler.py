"""Time of the scheduler's core a step: plan and result, without messages and worker.

    python -m bench.micro.scheduler [--policy NAME] [--json FILE]

Three loads at each number of running sequences: `steady`, where all decode and nothing changes but the pages; `drafted`, the same
where every row gives four tokens, three of them guessed; and `churn`, where in every step one sequence ends and another enters.
`waiting` more requests stand in the queue. Median and 99th percentile over the steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from array import array
from pathlib import Path

from bench.machine import provenance
from services.scheduler.lane import Lane, LaneCapacity, StepRules
from services.scheduler.lanes import Lanes
from services.scheduler.outbox import Outbox
from services.scheduler.policies.registry import POLICIES
from services.scheduler.scheduler import Scheduler
from services.scheduler.sequence import Sequence, StoppingRules
from services.scheduler.step_plan import StepPlan, StepResult
from services.scheduler.waiting_queue import WaitingQueue

NUM_RUNNING = (64, 256, 1024)
NUM_WAITING = (0, 1000)
LOADS = ("steady", "drafted", "churn")
NUM_DRAFTS = 3
PROMPT_TOKENS = 128
NUM_TENANTS = 16
EOS = 1
TOKEN = 17
STEP_NS = 5_000_000
"""What the worker says that a step took, whatever was in it: so its costs are learnt, and no prompt is limited."""


class Bench:
    """One scheduler with one lane whose worker answers at once."""

    def __init__(self, num_running: int, *, num_waiting: int, load: str, policy: str) -> None:
        is_churning = load == "churn"
        self.num_drafts = NUM_DRAFTS if load == "drafted" else 0
        lanes = Lanes()
        queue = WaitingQueue(POLICIES[policy](lanes), max_requests=10**6, max_tokens=10**9)
        self.core = Scheduler(lanes, queue, Outbox(linger_s=30), rules=StepRules(mixed_step_target_ns=10 * STEP_NS))
        capacity = LaneCapacity(
            model="m",
            max_model_len=8192,
            vocab_size=50_000,
            num_pages=num_running * 128,
            page_size=16,
            max_num_seqs=num_running,
            max_num_batched_tokens=8192,
            max_num_drafts=self.num_drafts,
        )
        self.lane: Lane = self.core.lane_joined(1, capacity, 0)
        self.rows: list[int] = []
        self.num_submitted = 0
        # With lengths that differ by one, churn ends one sequence a step.
        for index in range(num_running):
            self.submit(max_tokens=200 + index if is_churning else None)
        for _ in range(num_waiting):
            self.submit(max_tokens=num_running if is_churning else None)
        self.is_churning = is_churning
        self.num_running = num_running

    def submit(self, *, max_tokens: int | None) -> None:
        """Add a request."""
        self.num_submitted += 1
        stopping = StoppingRules(frozenset({EOS}), 0, max_tokens)
        self.core.submit(
            Sequence(
                request_id=f"r{self.num_submitted}",
                stream_id=self.num_submitted,
                owner=1,
                model="m",
                # Half of each prompt is everyone's, half its own.
                tokens=array("i", [TOKEN] * (PROMPT_TOKENS // 2) + [self.num_submitted] * (PROMPT_TOKENS // 2)),
                tenant=f"t{self.num_submitted % NUM_TENANTS}",
                num_prompt_tokens=PROMPT_TOKENS,
                stopping=stopping,
                target=self.core.outbox.target("d", 1),
            ),
            0,
        )

    def step(self) -> tuple[int, int]:
        """One step. Returns the nanoseconds of the plan and of the result."""
        started = time.perf_counter_ns()
        plan = self.core.plan(self.lane, 0)
        planned = time.perf_counter_ns()
        assert plan is not None
        result = self.answer(plan)
        resumed = time.perf_counter_ns()
        self.core.step_result(self.lane, result, 0)
        outcome = self.core.take_outcome()
        done = time.perf_counter_ns()
        if self.is_churning:
            for _ in outcome.endings:
                self.submit(max_tokens=self.num_running)
        return planned - started, done - resumed

    def answer(self, plan: StepPlan) -> StepResult:
        """What a worker would say: every row that is complete samples."""
        step = self.lane.in_flight[plan.step_id]
        # A list of its own, as one parsed from a message is.
        slots = list(step.sampled.slots)
        if not self.num_drafts:
            return StepResult(plan.step_id, slots, [TOKEN] * len(slots), duration_ns=STEP_NS)
        num_each = 1 + self.num_drafts
        num_drafts = self.num_drafts * len(slots)
        tokens = [TOKEN] * num_each * len(slots)
        return StepResult(plan.step_id, slots, tokens, [num_each] * len(slots), duration_ns=STEP_NS, num_drafts=num_drafts)


def measure(num_running: int, *, num_waiting: int, load: str, policy: str, num_steps: int) -> dict[str, object]:
    """Medians and tails, in microseconds."""
    bench = Bench(num_running, num_waiting=num_waiting, load=load, policy=policy)
    # Enough for every prompt to be prefilled and, with churn, for the lengths to spread.
    for _ in range(num_running * PROMPT_TOKENS // 8192 + (250 if load == "churn" else 20)):
        bench.step()
    gc.collect()
    plans, results, both = [], [], []
    for _ in range(num_steps):
        plan_ns, result_ns = bench.step()
        plans.append(plan_ns / 1e3)
        results.append(result_ns / 1e3)
        both.append((plan_ns + result_ns) / 1e3)
    return {
        "policy": policy,
        "load": load,
        "num_running": num_running,
        "num_waiting": num_waiting,
        "plan_us": round(statistics.median(plans), 1),
        "result_us": round(statistics.median(results), 1),
        "step_us": round(statistics.median(both), 1),
        "step_us_p99": round(statistics.quantiles(both, n=100)[98], 1),
    }


def main() -> None:
    """Measure all loads, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--policy", choices=POLICIES, default="fcfs", help="order of the waiting queue")
    parser.add_argument("--steps", type=int, default=400, help="steps measured for each load")
    arguments = parser.parse_args()
    rows = []
    print(f"{'load':8}{'running':>8}{'waiting':>8}{'plan µs':>10}{'result µs':>11}{'step µs':>10}{'p99':>10}")
    for load in LOADS:
        for num_running in NUM_RUNNING:
            for num_waiting in NUM_WAITING:
                row = measure(
                    num_running,
                    num_waiting=num_waiting,
                    load=load,
                    policy=arguments.policy,
                    num_steps=arguments.steps,
                )
                rows.append(row)
                print(
                    f"{row['load']:8}{row['num_running']:>8}{row['num_waiting']:>8}{row['plan_us']:>10}"
                    f"{row['result_us']:>11}{row['step_us']:>10}{row['step_us_p99']:>10}"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
