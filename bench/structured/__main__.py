"""What constrained rows cost a step: `python -m bench.structured [--rows 16] [--rounds 40]`.

Decode steps of the default model through the runner itself, without links: all rows unconstrained, all constrained, and half of
each. The rounds take turns, so that a change of the machine's speed meets all three alike; medians are told. The grammar is of a
schema with free strings, whose masks are the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Final

import numpy as np

from headrace.grammars import Matcher, compile_grammar, load_vocabulary
from headrace.models.model_config import load_model_config
from headrace.v1.common_pb2 import CONSTRAINT_KIND_GRAMMAR, Constraint, SamplingParams, WorkHeader
from headrace.v1.worker_pb2 import ConstrainedOutput, StepPlan
from services.worker import machine
from services.worker.constraints.output_constraints import OutputConstraints
from services.worker.loading import LoadOptions, load_runner
from services.worker.model_runner import ModelRunner
from services.worker.torch_import import import_torch

_SCHEMA: Final = {
    "type": "array",
    # No output ends while it is measured.
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
    "x-guidance": {"whitespace_pattern": r"[ \n\r\t]{1,40}"},
}
_PROMPT_TOKENS: Final = 64


def _runner(directory: Path, num_threads: int) -> ModelRunner:
    options = LoadOptions(
        directory=directory,
        backend="auto",
        num_threads=num_threads,
        dtype="auto",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        page_size=32,
        kv_cache_bytes=512 << 20,
        kv_cache_tokens=None,
    )
    runner, report = load_runner(options, cpu_flags=machine.cpu_flags(), available_bytes=machine.available_memory_bytes)
    config = load_model_config(directory)
    vocabulary = load_vocabulary(directory, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    prototype = compile_grammar(vocabulary, json.dumps({"grammars": [{"json_schema": _SCHEMA}]}))
    runner.constraints = OutputConstraints(_One(prototype), config.vocab_size, likeliest_allowed=runner.likeliest_allowed)
    print(f"backend {report.backend} ({report.backend_reason}), {num_threads} threads")
    return runner


class _One:
    """The one grammar."""

    def __init__(self, prototype: Matcher) -> None:
        self._prototype = prototype

    def find(self, grammar: str) -> Matcher:
        return self._prototype


def _enter(runner: ModelRunner, num_rows: int, num_constrained: int, temperature: float) -> None:
    num_pages = 2048 // 32 // 4
    plan = StepPlan()
    for slot in range(num_rows):
        sampling = SamplingParams(temperature=temperature, seed=slot)
        sequence = plan.new_sequences.add(slot=slot, work=WorkHeader(request_id=str(slot)), num_tokens=_PROMPT_TOKENS)
        sequence.sampling.CopyFrom(sampling)
        if slot < num_constrained:
            constraint = Constraint(kind=CONSTRAINT_KIND_GRAMMAR, source="the one")
            sequence.constrained.CopyFrom(ConstrainedOutput(constraint=constraint))
        plan.page_slots.append(slot)
        plan.num_new_pages.append(num_pages)
        plan.new_pages.extend(range(slot * num_pages, (slot + 1) * num_pages))
        plan.row_slots.append(slot)
        plan.row_num_new_tokens.append(_PROMPT_TOKENS)
    runner.step(plan, np.arange(num_rows * _PROMPT_TOKENS, dtype=np.int32) % 20_000 + 100)
    # From here on all rows compute one token.
    runner.step(StepPlan(row_slots=list(range(num_rows))), None)


def _step_times_ms(runner: ModelRunner, num_steps: int) -> list[float]:
    times = []
    for _ in range(num_steps):
        begun_ns = time.perf_counter_ns()
        result = runner.step(StepPlan(same_rows=True), None)
        times.append((time.perf_counter_ns() - begun_ns) / 1e6)
        assert not result.failed_slots and not result.ended_slots
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache/headrace/models/smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    asked = parser.parse_args()
    torch = import_torch()
    torch.set_num_threads(1)
    runner = _runner(asked.model, asked.threads)
    kinds = {"unconstrained": 0, "half constrained": asked.rows // 2, "all constrained": asked.rows}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(asked.rounds):
        for name, num_constrained in kinds.items():
            runner.reset()
            _enter(runner, asked.rows, num_constrained, asked.temperature)
            times[name] += _step_times_ms(runner, asked.steps)
    base = statistics.median(times["unconstrained"])
    for name, each in times.items():
        median = statistics.median(each)
        print(f"{name:18} {median:7.2f} ms a step of {asked.rows} rows   {100 * (median / base - 1):+5.1f} %")


if __name__ == "__main__":
    main()
