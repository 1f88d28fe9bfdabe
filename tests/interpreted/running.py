"""Runners of the two paths that must agree, and a few steps to compare them by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from services.worker.backend_choice import DeviceOptions
from services.worker.loading import LoadOptions, LoadReport, load_runner
from services.worker.model_runner import ModelRunner
from tests.parity.conftest import Driver


def options_for(directory: Path, attention_backend: str, **changes: Any) -> LoadOptions:
    values: dict[str, Any] = {
        "directory": directory,
        "backend": "auto",
        "num_threads": 1,
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "page_size": 8,
        "kv_cache_bytes": 0,
        "kv_cache_tokens": 512,
        "device": DeviceOptions(device="cpu", attention_backend=attention_backend),
    }
    return LoadOptions(**(values | changes))


def load(options: LoadOptions, **changes: Any) -> tuple[ModelRunner, LoadReport]:
    return load_runner(options, cpu_flags=frozenset(), available_bytes=lambda: 4 << 30, **changes)


def make_driver(directory: Path, attention_backend: str, **changes: Any) -> Driver:
    runner, report = load(options_for(directory, attention_backend, **changes))
    assert report.backend == attention_backend
    return Driver(runner)


def token_ids(num_tokens: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (num_tokens,), generator=generator).tolist()


def mixed_steps(driver: Driver) -> tuple[dict[int, list[int]], list[torch.Tensor]]:
    """Prefill in chunks, decode beside prefill, decode together; gives each slot's tokens, and the logits of all steps."""
    outputs: dict[int, list[int]] = {}
    logits: list[torch.Tensor] = []

    def step(rows: dict[int, int]) -> None:
        sampled, by_slot = driver.step(rows)
        for slot in sorted(sampled):
            outputs.setdefault(slot, []).append(sampled[slot])
            logits.append(by_slot[slot])

    driver.enter(0, token_ids(11, seed=1))
    driver.enter(1, token_ids(1, seed=2))
    step({0: 11, 1: 1})
    driver.enter(2, token_ids(13, seed=3))
    step({0: 1, 2: 9})
    step({1: 1, 2: 4, 0: 1})
    step({0: 1, 1: 1, 2: 1})
    return outputs, logits
