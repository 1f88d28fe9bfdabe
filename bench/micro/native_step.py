"""Time of a step in the native CPU kernels, and where it goes: `python -m bench.micro.native_step [--threads N]`.

Decode steps of several numbers of rows over a short context, and prefill of a chunk, alone and over a cached prefix. Only the
network is timed: no plan, no sampling, no link. Medians of many steps; nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from bench.machine import provenance
from bench.micro.native_runner import PAGE_SIZE, load_native_runner
from headrace.models.pull import pull
from headrace.v1.common_pb2 import SamplingParams, WorkHeader
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from kernels.cpu.library import OP_KINDS
from services.worker import machine
from services.worker.layers.native_ops import NativeNetwork
from services.worker.layers.ops import Best, StepTensors
from services.worker.model_runner import ModelRunner

CHUNK = 512
SEQUENCE_TOKENS = 2048


class Recorder:
    """Stands in a runner for its network; keeps the step that it is given, to compute it again."""

    def __init__(self, network: NativeNetwork) -> None:
        self._network = network
        self.step: StepTensors | None = None

    def forward(self, step: StepTensors) -> torch.Tensor:
        """Keep the step, and compute it."""
        self.step = step
        return self._network.forward(step)

    def best(self) -> Best | None:
        """See `Network.best`."""
        return self._network.best()

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """See `Network.copy_pages`."""
        self._network.copy_pages(sources, targets)

    def clear_pages(self, pages: torch.Tensor) -> None:
        """See `Network.clear_pages`."""
        self._network.clear_pages(pages)


def load(directory: Path, num_threads: int, num_rows_max: int) -> tuple[ModelRunner, NativeNetwork, Recorder]:
    """Load a model, with a recorder before its network."""
    runner = load_native_runner(
        directory,
        num_threads=num_threads,
        num_rows_max=num_rows_max,
        sequence_tokens=SEQUENCE_TOKENS,
        max_num_batched_tokens=CHUNK,
    )
    network = runner._network
    assert isinstance(network, NativeNetwork)
    recorder = Recorder(network)
    runner._network = recorder
    return runner, network, recorder


def enter(runner: ModelRunner, slot: int, num_tokens: int, vocab_size: int) -> None:
    """Compute a random prompt in a slot, in chunks; its pages are those of the slot's number."""
    first_page = slot * SEQUENCE_TOKENS // PAGE_SIZE
    num_pages = num_tokens // PAGE_SIZE + 8
    sampling = SamplingParams(temperature=0.0, seed=1)
    sequence = NewSequence(slot=slot, work=WorkHeader(request_id=f"r{slot}"), num_tokens=num_tokens, sampling=sampling)
    token_ids = np.random.default_rng(slot).integers(0, vocab_size, num_tokens).astype(np.int32)
    plan = StepPlan(
        freed_slots=[slot],
        new_sequences=[sequence],
        page_slots=[slot],
        num_new_pages=[num_pages],
        new_pages=range(first_page, first_page + num_pages),
    )
    for start in range(0, num_tokens, CHUNK):
        plan.row_slots.append(slot)
        plan.row_num_new_tokens.append(min(CHUNK, num_tokens - start))
        runner.step(plan, token_ids if start == 0 else None)
        plan = StepPlan()


def measure(name: str, network: NativeNetwork, step: StepTensors | None, num_steps: int) -> None:
    """Print the median time of a step and the mean time by operation."""
    assert step is not None
    network.forward(step)
    times_s = []
    network.start_profile()
    for _ in range(num_steps):
        start = time.perf_counter()
        network.forward(step)
        times_s.append(time.perf_counter() - start)
    shares = ", ".join(f"{kind} {ns / num_steps / 1e6:.2f}" for kind, ns in zip(OP_KINDS, network.profile(), strict=True) if ns)
    print(f"{name:28} {1000 * statistics.median(times_s):7.2f} ms   {shares}", flush=True)


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a model's name, as `headrace models pull` takes it")
    parser.add_argument("--store", type=Path, default=Path("~/.cache/headrace/models"), help="where models are kept")
    parser.add_argument("--threads", type=int, default=machine.num_usable_cores(), help="threads that compute")
    parser.add_argument("--rows", default="1,4,16,32", help="rows of the decode steps")
    parser.add_argument("--context", type=int, default=150, help="tokens before each decode step")
    options = parser.parse_args()
    rows = [int(number) for number in options.rows.split(",")]
    runner, network, recorder = load(pull(options.model, options.store.expanduser()), options.threads, max(rows))
    print(provenance(), f"threads: {options.threads}", sep="\n")
    vocab_size = runner.limits.vocab_size
    with torch.inference_mode():
        for num_rows in rows:
            for slot in range(num_rows):
                enter(runner, slot, options.context, vocab_size)
            runner.step(StepPlan(row_slots=range(num_rows)), None)
            measure(f"decode, {num_rows} rows", network, recorder.step, 40)
        for num_tokens in (128, CHUNK, 3 * CHUNK):
            enter(runner, 0, num_tokens, vocab_size)
            cached = num_tokens - min(num_tokens, CHUNK)
            measure(f"prefill, {num_tokens - cached} after {cached}", network, recorder.step, 8)


if __name__ == "__main__":
    main()
