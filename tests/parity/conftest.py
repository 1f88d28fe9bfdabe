"""Parity with transformers: tiny random checkpoints, the default model in both implementations, and a hand-driven runner."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace.models.model_config import load_model_config
from headrace.models.weights import open_weights
from headrace.v1.common_pb2 import SamplingParams, WorkHeader
from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from kernels.cpu.library import LIBRARY_FILE
from services.worker.layers.ops import Best, Network, StepTensors
from services.worker.loading import LoadOptions, load_runner
from services.worker.model_runner import ModelRunner
from tests.parity.families import FAMILIES, make_checkpoint

BACKENDS = ["torch", "native"]
"""What computes; every test of a family runs with each."""

PAGE_SIZES = {"torch": {"small": 1, "odd": 5, "large": 16}, "native": {"small": 16, "odd": 32, "large": 64}}
"""Page sizes to try, by backend; the native kernels have these alone."""


class RecordingNetwork:
    """Passes steps on and keeps the logits of the last one."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.logits = torch.empty(0)

    def forward(self, step: StepTensors) -> torch.Tensor:
        self.logits = self._network.forward(step).clone()
        return self.logits

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self._network.copy_pages(sources, targets)

    def best(self) -> Best | None:
        return self._network.best()

    def clear_pages(self, pages: torch.Tensor) -> None:
        self._network.clear_pages(pages)


class Driver:
    """A scheduler by hand: gives out slots and shuffled pages, and collects the logits of every sampled row by slot."""

    def __init__(self, runner: ModelRunner, *, seed: int = 0) -> None:
        self.runner = runner
        self.network = RecordingNetwork(runner._network)
        runner._network = self.network
        self.result = StepResult()
        self._free_pages = np.random.default_rng(seed).permutation(runner.limits.num_pages).tolist()
        self._plan = StepPlan()
        self._entering: list[int] = []
        self._num_computed: dict[int, int] = {}
        self._num_pages: dict[int, int] = {}

    def enter(
        self, slot: int, token_ids: list[int], *, logprobs: int | None = None, prompt_logprobs: int | None = None, **sampling: Any
    ) -> None:
        params = SamplingParams(**({"temperature": 0.0, "seed": 1} | sampling))
        work = WorkHeader(request_id=f"r{slot}")
        self._plan.new_sequences.append(
            NewSequence(
                slot=slot,
                work=work,
                num_tokens=len(token_ids),
                sampling=params,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        )
        self._entering += token_ids
        self._num_computed[slot] = self._num_pages[slot] = 0

    def fork(self, slot: int, source: int, token_ids: list[int]) -> None:
        """Enter a sequence whose tokens are the first of another: it shares full pages and has a copy of the last one."""
        self.enter(slot, token_ids)
        num_cached = self._num_computed[slot] = self._plan.new_sequences[-1].num_cached_tokens = len(token_ids) - 1
        page_size = self.runner.limits.page_size
        pages = self.runner._inputs._page_table[source, : -(-num_cached // page_size)].tolist()
        if num_cached % page_size:
            self._plan.copied_pages.append(pages[-1])
            pages[-1] = self._free_pages.pop()
            self._plan.page_copies.append(pages[-1])
        self._plan.page_slots.append(slot)
        self._plan.num_new_pages.append(len(pages))
        self._plan.new_pages.extend(pages)
        self._num_pages[slot] = len(pages)

    def free(self, slot: int) -> None:
        self._plan.freed_slots.append(slot)

    def force(self, slot: int, token_id: int) -> None:
        """Put another token in the place of the one sampled last."""
        inputs = self.runner._inputs
        inputs.tokens[slot, inputs._num_tokens[slot] - 1] = token_id

    def step(self, rows: dict[int, int]) -> tuple[dict[int, int], dict[int, torch.Tensor]]:
        """Compute rows `{slot: num_new_tokens}`; gives the sampled tokens and their logits, by slot."""
        plan, self._plan = self._plan, StepPlan()
        page_size = self.runner.limits.page_size
        for slot, count in rows.items():
            self._num_computed[slot] += count
            missing = -(-self._num_computed[slot] // page_size) - self._num_pages[slot]
            if missing > 0:
                plan.page_slots.append(slot)
                plan.num_new_pages.append(missing)
                plan.new_pages.extend(self._free_pages.pop() for _ in range(missing))
                self._num_pages[slot] += missing
        plan.row_slots.extend(rows)
        plan.row_num_new_tokens.extend(rows.values())
        token_ids = np.array(self._entering, dtype=np.int32)
        self._entering = []
        self.result = result = self.runner.step(plan, token_ids)
        assert not result.failed_slots
        # Those of prompts come behind.
        logits = dict(zip(result.slots, self.network.logits[: len(result.slots)], strict=True))
        return dict(zip(result.slots, result.token_ids, strict=True)), logits

    def generate(self, prompts: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        """Greedy tokens of several prompts, prefilled in one step and decoded together."""
        for slot, prompt in prompts.items():
            self.enter(slot, prompt)
        sampled, _ = self.step({slot: len(prompt) for slot, prompt in prompts.items()})
        outputs = {slot: [token_id] for slot, token_id in sampled.items()}
        for _ in range(num_tokens - 1):
            sampled, _ = self.step(dict.fromkeys(prompts, 1))
            for slot, token_id in sampled.items():
                outputs[slot].append(token_id)
        for slot in prompts:
            self.free(slot)
        return outputs


def _make_driver(
    directory: Path,
    *,
    backend: str = "torch",
    dtype: str | None = None,
    page_size: int | None = None,
    kv_cache_tokens: int = 4096,
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
) -> Driver:
    context = load_model_config(directory).max_position_embeddings
    options = LoadOptions(
        directory=directory,
        backend=backend,
        num_threads=2,
        # The native kernels know no other type.
        dtype=dtype or {"torch": "float32", "native": "auto"}[backend],
        max_model_len=max_model_len or min(context, 512),
        max_num_seqs=24,
        max_num_batched_tokens=1024,
        page_size=page_size or {"torch": 8, "native": 16}[backend],
        kv_cache_bytes=0,
        kv_cache_tokens=kv_cache_tokens,
        kv_cache_dtype=kv_cache_dtype,
    )
    runner, _ = load_runner(options, cpu_flags=frozenset(), available_bytes=lambda: 4 << 30)
    return Driver(runner)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On a busy machine, two threads wait for each other most of the time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_driver() -> Callable[..., Driver]:
    return _make_driver


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of what computes, for `make_driver`."""
    name: str = request.param
    if name == "native" and not LIBRARY_FILE.is_file():
        pytest.skip("the native library is not built: no C++ compiler")
    return name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Give a family's directory and transformers' model of it, made once; by its name in `FAMILIES`."""

    @functools.cache
    def make(name: str) -> tuple[Path, Any]:
        directory = tmp_path_factory.mktemp("checkpoint")
        return directory, make_checkpoint(FAMILIES[name], directory)

    return make


@pytest.fixture(scope="session")
def reference_smollm2(default_model_directory: Path) -> transformers.LlamaForCausalLM:
    """transformers' model with the very weights of the default model's file, in float32."""
    config = load_model_config(default_model_directory)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(default_model_directory))
    weights = open_weights(default_model_directory)
    state = {name: torch.from_numpy(weights.load(name)).float() for name in weights.names()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    assert config.num_layers == len(model.model.layers)
    return model.float().eval()
