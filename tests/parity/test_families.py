"""Goal: every family computes what transformers computes of the same checkpoint. Method: tiny random checkpoints, float32, and the
logits of every step compared with those of one pass of transformers over the whole sequence.

How near is near: `assert_near` in `families.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.errors import ConfigError
from tests.parity.conftest import BACKENDS, PAGE_SIZES
from tests.parity.families import FAMILIES, NOT_NATIVE, assert_near


def with_backends(*names: str) -> Any:
    """Run a test for families, with each backend that computes them."""
    pairs = [(name, backend) for name in names for backend in BACKENDS if backend == "torch" or name not in NOT_NATIVE]
    return pytest.mark.parametrize(("name", "backend"), pairs, indirect=["backend"])


def tokens(num_tokens: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (num_tokens,), generator=generator).tolist()


def run(driver: Any, prompts: dict[int, list[int]], steps: list[dict[int, int]]) -> tuple[dict[int, list[int]], dict[int, Any]]:
    """Compute steps `{slot: num_new_tokens}`; gives each slot's whole history, and its logits by position."""
    histories = {slot: list(prompt) for slot, prompt in prompts.items()}
    logits: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
    for slot, prompt in prompts.items():
        driver.enter(slot, prompt)
    for rows in steps:
        sampled, step_logits = driver.step(rows)
        for slot, row_logits in step_logits.items():
            logits[slot][len(histories[slot]) - 1] = row_logits
            histories[slot].append(sampled[slot])
    return histories, logits


def assert_equal(backend: str, model: Any, histories: dict[int, list[int]], logits: dict[int, Any]) -> None:
    for slot, by_position in logits.items():
        with torch.inference_mode():
            theirs = model(torch.tensor([histories[slot]])).logits[0]
        assert_near(backend, torch.stack(list(by_position.values())), theirs[list(by_position)])


@with_backends(*FAMILIES)
def test_prefill_and_paged_decode_give_the_logits_of_transformers(
    name: str, backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = checkpoint(name)
    driver = make_driver(directory, backend=backend)
    assert_equal(backend, model, *run(driver, {3: tokens(29, seed=1)}, [{3: 29}, *[{3: 1}] * 7]))


@pytest.mark.parametrize("page_size", ["small", "odd", "large"])
@with_backends(*FAMILIES)
def test_chunked_prefill_and_mixed_batches_give_the_logits_of_transformers(
    name: str, page_size: str, backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = checkpoint(name)
    driver = make_driver(directory, backend=backend, page_size=PAGE_SIZES[backend][page_size])
    prompts = {slot: tokens(length, seed=slot) for slot, length in {0: 50, 1: 3, 2: 40, 5: 1, 9: 61}.items()}
    # Rows enter in any order, are chunked, down to single tokens, decode beside prefills, and are left out of steps.
    steps = [{2: 17, 0: 50}, {1: 3, 2: 11, 0: 1}, {0: 1, 5: 1, 2: 1, 1: 1, 9: 8}, {9: 53, 1: 1, 2: 11, 0: 1}, {5: 1, 2: 1, 9: 1}]
    histories, logits = run(driver, prompts, steps)
    assert {slot: len(history) for slot, history in histories.items()} == {0: 54, 1: 6, 2: 42, 5: 3, 9: 63}
    assert_equal(backend, model, histories, logits)


@with_backends("llama", "llama llama3", "gemma2")
@pytest.mark.parametrize("chunks", [(1, 1, 1, 34), (7, 13, 17), (36, 1), (5, 8, 8, 16)], ids=str)
def test_prefill_in_odd_chunks_gives_the_logits_of_transformers(
    name: str, chunks: tuple[int, ...], backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = checkpoint(name)
    driver = make_driver(directory, backend=backend)
    assert_equal(backend, model, *run(driver, {0: tokens(37, seed=2)}, [{0: chunk} for chunk in chunks]))


@pytest.mark.parametrize("num_tokens", [17, 20, 24, 25], ids=str)
@with_backends("llama", "gemma3")
def test_a_fork_goes_on_from_the_prompt_of_another(
    name: str, num_tokens: int, backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    """The source has outputs of its own in the last page by then, and goes on beside its forks."""
    directory, model = checkpoint(name)
    driver = make_driver(directory, backend=backend)
    prompt = tokens(num_tokens, seed=5)
    histories, logits = run(driver, {0: prompt}, [{0: num_tokens}])
    for slot in (1, 2):
        driver.fork(slot, 0, prompt)
        histories[slot], logits[slot] = list(prompt), {}
    for step in range(5):
        sampled, step_logits = driver.step({0: 1, 1: 1, 2: 1})
        for slot, history in histories.items():
            logits[slot][len(history) - 1] = step_logits[slot]
            # Each goes another way.
            history.append((sampled[slot] + slot * (step + 1)) % 251)
            driver.force(slot, history[-1])
    assert_equal(backend, model, histories, logits)


def test_a_freed_slot_and_its_pages_serve_the_next_sequence(backend: str, checkpoint: Callable[..., Any], make_driver: Any) -> None:
    directory, model = checkpoint("mistral window")
    driver = make_driver(directory, backend=backend, kv_cache_tokens=256)
    for seed in range(3):
        prompt = tokens(20 + seed, seed=seed)
        assert_equal(backend, model, *run(driver, {4: prompt}, [{4: len(prompt)}, {4: 1}]))
        driver.free(4)


@with_backends("llama", "gpt_oss")
def test_greedy_text_is_the_same_alone_and_among_neighbours(
    name: str, backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, _ = checkpoint(name)
    prompts = {slot: tokens(10 + 5 * slot, seed=slot) for slot in range(16)}
    together = make_driver(directory, backend=backend).generate(prompts, 12)
    driver = make_driver(directory, backend=backend)
    alone = {slot: driver.generate({slot: prompt}, 12)[slot] for slot, prompt in prompts.items()}
    assert together == alone


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_bfloat16_stays_near_float32(name: str, checkpoint: Callable[..., Any], make_driver: Any) -> None:
    directory, model = checkpoint(name)
    prompt = tokens(33, seed=3)
    driver = make_driver(directory, dtype="bfloat16")
    _, logits = run(driver, {0: prompt}, [{0: 20}, {0: 13}])
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt])).logits[0, -1]
    # bfloat16 keeps 8 bits: some per cent of the logits' spread is what its rounding leaves over three layers.
    assert float((logits[0][32] - theirs).abs().mean()) < 0.05 * float(theirs.std())


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("name", sorted(NOT_NATIVE))
def test_mixtures_are_left_to_torch(name: str, backend: str, checkpoint: Callable[..., Any], make_driver: Any) -> None:
    directory, _ = checkpoint(name)
    with pytest.raises(ConfigError, match=r"worker\.backend is native: mixtures of experts"):
        make_driver(directory, backend=backend)
    assert "TorchNetwork" in repr(make_driver(directory, backend="auto", dtype="auto", page_size=16).network._network)
