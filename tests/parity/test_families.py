"""Goal: every family computes what transformers computes of the same checkpoint. Method: tiny random checkpoints, float32, and the
logits of every step compared with those of one pass of transformers over the whole sequence.

The bound is on the largest absolute difference of logits that are themselves of order 1 to 10: float32 rounding leaves about 2e-5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parity.families import FAMILIES

ABS_DIFFERENCE_MAX = 1e-4

pytestmark = pytest.mark.timeout(120)


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


def assert_equal(model: Any, histories: dict[int, list[int]], logits: dict[int, Any]) -> None:
    for slot, by_position in logits.items():
        with torch.inference_mode():
            theirs = model(torch.tensor([histories[slot]])).logits[0]
        ours = torch.stack(list(by_position.values()))
        expected = theirs[list(by_position)]
        assert ours.shape == expected.shape
        assert float((ours - expected).abs().max()) < ABS_DIFFERENCE_MAX


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_paged_decode_give_the_logits_of_transformers(
    name: str, backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = checkpoint(name)
    driver = make_driver(directory, backend=backend)
    assert_equal(model, *run(driver, {3: tokens(29, seed=1)}, [{3: 29}, *[{3: 1}] * 7]))


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_chunked_prefill_and_mixed_batches_give_the_logits_of_transformers(
    name: str, page_size: int, backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = checkpoint(name)
    driver = make_driver(directory, backend=backend, page_size=page_size)
    prompts = {slot: tokens(length, seed=slot) for slot, length in {0: 50, 1: 3, 2: 40, 5: 1, 9: 61}.items()}
    # Rows enter in any order, are chunked, down to single tokens, decode beside prefills, and are left out of steps.
    steps = [{2: 17, 0: 50}, {1: 3, 2: 11, 0: 1}, {0: 1, 5: 1, 2: 1, 1: 1, 9: 8}, {9: 53, 1: 1, 2: 11, 0: 1}, {5: 1, 2: 1, 9: 1}]
    histories, logits = run(driver, prompts, steps)
    assert {slot: len(history) for slot, history in histories.items()} == {0: 54, 1: 6, 2: 42, 5: 3, 9: 63}
    assert_equal(model, histories, logits)


@pytest.mark.parametrize("name", ["llama", "llama llama3", "gemma2"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 34), (7, 13, 17), (36, 1), (5, 8, 8, 16)], ids=str)
def test_prefill_in_odd_chunks_gives_the_logits_of_transformers(
    name: str, chunks: tuple[int, ...], backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = checkpoint(name)
    driver = make_driver(directory, backend=backend)
    assert_equal(model, *run(driver, {0: tokens(37, seed=2)}, [{0: chunk} for chunk in chunks]))


@pytest.mark.parametrize("num_tokens", [17, 20, 24, 25], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
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
    assert_equal(model, histories, logits)


def test_a_freed_slot_and_its_pages_serve_the_next_sequence(backend: str, checkpoint: Callable[..., Any], make_driver: Any) -> None:
    directory, model = checkpoint("mistral window")
    driver = make_driver(directory, backend=backend, kv_cache_tokens=256)
    for seed in range(3):
        prompt = tokens(20 + seed, seed=seed)
        assert_equal(model, *run(driver, {4: prompt}, [{4: len(prompt)}, {4: 1}]))
        driver.free(4)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_row_is_the_same_alone_and_among_neighbours_in_float32(
    name: str, backend: str, checkpoint: Callable[..., Any], make_driver: Any
) -> None:
    directory, _ = checkpoint(name)
    prompts = {slot: tokens(10 + 5 * slot, seed=slot) for slot in range(16)}
    together = make_driver(directory, backend=backend).generate(prompts, 12)
    driver = make_driver(directory, backend=backend)
    alone = {slot: driver.generate({slot: prompt}, 12)[slot] for slot, prompt in prompts.items()}
    assert together == alone


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_bfloat16_stays_near_float32(name: str, backend: str, checkpoint: Callable[..., Any], make_driver: Any) -> None:
    directory, model = checkpoint(name)
    prompt = tokens(33, seed=3)
    driver = make_driver(directory, backend=backend, dtype="bfloat16")
    _, logits = run(driver, {0: prompt}, [{0: 20}, {0: 13}])
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt])).logits[0, -1]
    # bfloat16 keeps 8 bits: some per cent of the logits' spread is what its rounding leaves over three layers.
    assert float((logits[0][32] - theirs).abs().mean()) < 0.05 * float(theirs.std())
