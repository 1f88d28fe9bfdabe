"""What drawing tokens costs a decode step: `python -m bench.micro.sampling [--rows 1,8,16,64] [--temperature 0.7 --top-p 0.9]`.

Decode steps of a model through the runner itself, without links, drawn by the native kernel and by torch in turns, so that a change
of the machine's speed meets both alike; medians. Without `--temperature` several kinds of sampling are measured, penalties among
them. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from bench.machine import provenance
from bench.micro.native_runner import PAGE_SIZE, load_native_runner
from headrace.models.pull import pull
from headrace.v1.common_pb2 import SamplingParams, WorkHeader
from headrace.v1.worker_pb2 import StepPlan
from services.worker import machine
from services.worker.model_runner import ModelRunner
from services.worker.torch_import import import_torch

SEQUENCE_TOKENS = 512
PROMPT_TOKENS = 64

KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(temperature=1.0),
    "0.7, top-p 0.9, top-k 40": SamplingParams(temperature=0.7, top_p=0.9, top_k=40),
    "0.7, top-p 0.9": SamplingParams(temperature=0.7, top_p=0.9),
    "1, min-p 0.05": SamplingParams(temperature=1.0, min_p=0.05),
    "1, penalties": SamplingParams(temperature=1.0, frequency_penalty=0.1, presence_penalty=0.1, repetition_penalty=1.1),
}


def enter(runner: ModelRunner, num_rows: int, sampling: SamplingParams) -> None:
    """Compute a random prompt in each slot; from then on all rows compute one token."""
    num_pages = SEQUENCE_TOKENS // PAGE_SIZE
    for slot in range(num_rows):
        plan = StepPlan(page_slots=[slot], num_new_pages=[num_pages], row_slots=[slot], row_num_new_tokens=[PROMPT_TOKENS])
        plan.new_pages.extend(range(slot * num_pages, (slot + 1) * num_pages))
        sequence = plan.new_sequences.add(slot=slot, work=WorkHeader(request_id=str(slot)), num_tokens=PROMPT_TOKENS)
        sequence.sampling.CopyFrom(sampling)
        sequence.sampling.seed = slot
        tokens = np.random.default_rng(slot).integers(0, runner.limits.vocab_size, PROMPT_TOKENS)
        runner.step(plan, tokens.astype(np.int32))
    runner.step(StepPlan(row_slots=list(range(num_rows))), None)


def step_times_ms(runner: ModelRunner, num_steps: int) -> list[float]:
    """Times of decode steps."""
    times = []
    for _ in range(num_steps):
        begun_ns = time.perf_counter_ns()
        runner.step(StepPlan(same_rows=True), None)
        times.append((time.perf_counter_ns() - begun_ns) / 1e6)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro.sampling", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a model's name, as `headrace models pull` takes it")
    parser.add_argument("--store", type=Path, default=Path("~/.cache/headrace/models"), help="where models are kept")
    parser.add_argument("--threads", type=int, default=machine.num_usable_cores(), help="threads that compute")
    parser.add_argument("--rows", default="1,8,16,64", help="rows of the decode steps")
    parser.add_argument("--steps", type=int, default=15, help="steps of each kind in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, help="measure this sampling alone, with the filters below")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    asked = parser.parse_args()
    kinds = KINDS
    if asked.temperature is not None:
        own = SamplingParams(temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k, min_p=asked.min_p)
        kinds = {"as asked": own}
    import_torch().set_num_threads(1)
    counts = [int(number) for number in asked.rows.split(",")]
    runner = load_native_runner(
        pull(asked.model, asked.store.expanduser()),
        num_threads=asked.threads,
        num_rows_max=max(counts),
        sequence_tokens=SEQUENCE_TOKENS,
        max_num_batched_tokens=max(512, *counts),
    )
    print(provenance(), f"threads: {asked.threads}", sep="\n")
    draws = {"native": runner._draw, "torch": None}
    for num_rows in counts:
        for name, sampling in kinds.items():
            times: dict[str, list[float]] = {drawn_by: [] for drawn_by in draws}
            for _ in range(asked.rounds):
                for drawn_by, draw in draws.items():
                    runner.reset()
                    runner._draw = draw
                    enter(runner, num_rows, sampling)
                    times[drawn_by] += step_times_ms(runner, asked.steps)
            medians = ", ".join(f"{drawn_by} {statistics.median(each):6.2f}" for drawn_by, each in times.items())
            print(f"{num_rows:3} rows, {name:26} ms a step: {medians}", flush=True)


if __name__ == "__main__":
    main()
