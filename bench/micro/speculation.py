"""What speculation saves on a real model: steps, time, and whether the outputs are the same.

    python -m bench.micro.speculation [--model NAME] [--clients 1,4] [--rounds 3] [--json FILE]

The scheduler's core and the worker's runner in one process, so that nothing but they is measured. Three texts: `edit` and `quote`
ask for code and prose of Python's standard library to be given again (greedy), `free` goes on from random words at temperature 1,
which hardly repeats. Each is generated with speculation off, by its defaults (auto) and with every draft that is found (ngram), in
turn, so that a machine that slows down does so for all. Prompts are computed before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from bench.machine import provenance
from bench.peers import texts
from headrace.models.store import resolve
from headrace.v1.common_pb2 import SamplingParams, SpeculativeMethod, SpeculativeParams, WorkHeader
from headrace.wire.envelope import int32_array
from services.scheduler import messages
from services.scheduler.lane import LaneCapacity, StepRules
from services.scheduler.lanes import Lanes
from services.scheduler.outbox import Outbox
from services.scheduler.policies.registry import POLICIES
from services.scheduler.scheduler import Scheduler
from services.scheduler.sequence import Sequence, StoppingRules
from services.scheduler.waiting_queue import WaitingQueue
from services.worker import machine
from services.worker.drafting.factory import make_speculation
from services.worker.entering import num_entering_tokens
from services.worker.loading import LoadOptions, load_runner
from services.worker.model_runner import ModelRunner

METHODS: Final = {
    "off": SpeculativeMethod.SPECULATIVE_METHOD_OFF,
    "auto": SpeculativeMethod.SPECULATIVE_METHOD_AUTO,
    "ngram": SpeculativeMethod.SPECULATIVE_METHOD_NGRAM,
}
TEXTS: Final = ("edit", "quote", "free")
PROMPT_TOKENS: Final = {"edit": 1000, "quote": 1000, "free": 128}


@dataclass(slots=True)
class Run:
    """One generation of a text by one method."""

    outputs: list[list[int]]
    num_steps: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    num_verified_rows: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Figures:
    """All runs of a text by one method."""

    text: str
    num_clients: int
    method: str
    runs: list[Run] = field(default_factory=list)

    def row(self, off: Figures) -> dict[str, object]:
        """Medians, and how they compare with no speculation."""
        num_tokens = sum(map(len, self.runs[0].outputs))
        num_steps = statistics.median(run.num_steps for run in self.runs)
        num_drafts = sum(run.num_drafts for run in self.runs)
        num_rows = sum(run.num_verified_rows for run in self.runs)
        num_accepted = sum(run.num_accepted for run in self.runs)
        ratios = [before.seconds / run.seconds for before, run in zip(off.runs, self.runs, strict=True)]
        same = sum(a == b for x, y in zip(off.runs, self.runs, strict=True) for a, b in zip(x.outputs, y.outputs, strict=True))
        return {
            "text": self.text,
            "clients": self.num_clients,
            "method": self.method,
            "steps": num_steps,
            "tokens_a_row": round(num_tokens / self.num_clients / num_steps, 2),
            "acceptance_rate": round(num_accepted / num_drafts, 3) if num_drafts else None,
            "accept_length": round(1 + num_accepted / num_rows, 2) if num_rows else None,
            "tokens_a_second": round(statistics.median(num_tokens / run.seconds for run in self.runs), 1),
            "faster": round(statistics.median(ratios), 3),
            "same_outputs": f"{same}/{len(self.runs) * self.num_clients}",
        }


class Lane:
    """A scheduler with one lane, whose worker is the runner itself."""

    def __init__(self, runner: ModelRunner) -> None:
        limits = runner.limits
        runner.reset()
        lanes = Lanes()
        self._runner = runner
        queue = WaitingQueue(POLICIES["fcfs"](lanes), max_requests=10**6, max_tokens=10**9)
        # Nothing is cached, so that no run finds the prompts of the one before.
        self._core = Scheduler(lanes, queue, Outbox(linger_s=30), None, rules=StepRules(run_ahead=False))
        capacity = LaneCapacity(
            model="m",
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_drafts=runner.max_num_drafts,
        )
        self._lane = self._core.lane_joined(1, capacity, 0)

    def generate(self, prompts: list[list[int]], *, num_tokens: int, temperature: float, method: str) -> Run:
        """Answer all prompts at once."""
        held = [self._submit(index, prompt, num_tokens, temperature, method) for index, prompt in enumerate(prompts)]
        run = Run(outputs=[])
        while self._core.num_requests:
            is_decoding = not self._lane.prefilling
            started = time.perf_counter()
            self._step(run if is_decoding else Run([]))
            if is_decoding:
                run.seconds += time.perf_counter() - started
                run.num_steps += 1
        run.outputs = [sequence.output_from(0).tolist() for sequence in held]
        return run

    def _submit(self, index: int, prompt: list[int], num_tokens: int, temperature: float, method: str) -> Sequence:
        sequence = Sequence(
            request_id=str(index),
            stream_id=index,
            owner=1,
            model="m",
            tokens=array("i", prompt),
            num_prompt_tokens=len(prompt),
            stopping=StoppingRules(frozenset(), 0, num_tokens),
            target=self._core.outbox.target("d", 1),
            sampling=SamplingParams(temperature=temperature, seed=index + 1),
            speculative=SpeculativeParams(method=METHODS[method]),
            num_drafts_asked=0 if method == "off" else None,
        )
        self._core.submit(sequence, 0)
        return sequence

    def _step(self, run: Run) -> None:
        plan = self._core.plan(self._lane, 0)
        assert plan is not None
        body, frames = messages.step_plan(plan, [WorkHeader(request_id=new.request_id) for new in plan.new_sequences])
        token_ids = int32_array(memoryview(frames[0]), count=num_entering_tokens(body)) if frames else None
        result = self._runner.step(body, token_ids)
        if plan.num_rows:
            self._core.step_result(self._lane, messages.step_result(result), 0)
        self._core.take_outcome()
        counts = result.num_tokens or [1] * len(result.slots)
        for num_drafts, count in zip(result.num_drafts, counts, strict=False):
            run.num_drafts += num_drafts
            run.num_accepted += count - 1
            run.num_verified_rows += num_drafts > 0


def make_prompts(text: str, tokenizer: Tokenizer, num_clients: int, *, seed: int) -> list[list[int]]:
    """Prompts of about PROMPT_TOKENS tokens, another for each client."""

    def count(part: str) -> int:
        return len(tokenizer.encode(part, add_special_tokens=False).ids)

    num_tokens = PROMPT_TOKENS[text]
    prompts = []
    for client in range(num_clients):
        rng = random.Random(f"{seed}/{text}/{client}")
        if text == "free":
            prompt = texts.words_of(rng, count, num_tokens)
        else:
            prompt = texts.repeating_prompt(rng, count, num_tokens, is_code=text == "edit")
        prompts.append(tokenizer.encode(prompt, add_special_tokens=False).ids)
    return prompts


def load(arguments: argparse.Namespace) -> tuple[ModelRunner, Tokenizer]:
    """The model as the worker loads it."""
    directory = resolve(arguments.model, Path(arguments.store).expanduser())
    num_threads = arguments.threads or len(os.sched_getaffinity(0))
    options = LoadOptions(
        directory=directory,
        backend=arguments.backend,
        num_threads=num_threads,
        dtype=arguments.dtype,
        max_model_len=None,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        page_size=32,
        kv_cache_bytes=1 << 29,
        kv_cache_tokens=None,
    )
    with ThreadPoolExecutor(num_threads) as pool:
        runner, report = load_runner(
            options, cpu_flags=machine.cpu_flags(), available_bytes=machine.available_memory_bytes, map_parts=pool.map
        )
    torch.set_num_threads(1 if report.backend == "native" else num_threads)
    print(f"{arguments.model}, {report.backend}, {report.dtype}, {num_threads} threads")
    runner.warm_up()
    runner.speculation = make_speculation(
        "auto", max_num_drafts=arguments.drafts, limits=runner.limits, now_ns=time.perf_counter_ns
    )
    return runner, Tokenizer.from_file(str(directory / "tokenizer.json"))


def measure(runner: ModelRunner, tokenizer: Tokenizer, text: str, num_clients: int, arguments: argparse.Namespace) -> list[Figures]:
    """Every method in turn, several times."""
    found = [Figures(text, num_clients, method) for method in METHODS]
    for seed in range(arguments.rounds):
        prompts = make_prompts(text, tokenizer, num_clients, seed=seed)
        for figures in found:
            run = Lane(runner).generate(
                prompts, num_tokens=arguments.tokens, temperature=1.0 if text == "free" else 0.0, method=figures.method
            )
            figures.runs.append(run)
    return found


def main() -> None:
    """Measure all texts, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--store", default="~/.cache/headrace/models", help="where models are kept")
    parser.add_argument("--backend", choices=("auto", "native", "torch"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, help="threads that compute; all cores where left out")
    parser.add_argument("--drafts", type=int, default=8, help="most drafts of a row")
    parser.add_argument("--clients", default="1,4,16", help="sequences at a time, by commas")
    parser.add_argument("--tokens", type=int, default=200, help="output tokens of each")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method")
    parser.add_argument("--texts", default=",".join(TEXTS), help="which, by commas")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    runner, tokenizer = load(arguments)
    rows = []
    print(
        f"{'text':8}{'clients':>8}{'method':>8}{'steps':>8}{'tok/row':>9}{'rate':>7}{'length':>8}{'tok/s':>9}{'faster':>8}{'same':>7}"
    )
    for text in arguments.texts.split(","):
        for num_clients in map(int, arguments.clients.split(",")):
            figures = measure(runner, tokenizer, text, num_clients, arguments)
            for each in figures:
                row = each.row(figures[0])
                rows.append(row)
                print(
                    f"{row['text']!s:8}{row['clients']!s:>8}{row['method']!s:>8}{row['steps']!s:>8}{row['tokens_a_row']!s:>9}"
                    f"{row['acceptance_rate'] or '-'!s:>7}{row['accept_length'] or '-'!s:>8}{row['tokens_a_second']!s:>9}"
                    f"{row['faster']!s:>8}{row['same_outputs']!s:>7}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
