"""Goal: our Llama computes what transformers' does. Method: tiny random checkpoints, float32, logits compared at every step.

The bound is on the largest absolute difference of logits that are themselves of order 10: float32 rounding leaves about 2e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

ABS_DIFFERENCE_MAX = 1e-4

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 6},
    "one_kv_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 16},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}

pytestmark = pytest.mark.timeout(120)


def tokens(num_tokens: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (num_tokens,), generator=generator).tolist()


def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0, -1]
    return logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < ABS_DIFFERENCE_MAX


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_paged_decode_give_the_logits_of_transformers(
    name: str, tiny_llama: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = tiny_llama(**CONFIGS[name])
    driver = make_driver(directory)
    history = tokens(29, seed=1)
    driver.enter(3, history)
    sampled, logits = driver.step({3: 29})
    for _ in range(7):
        assert_close(logits[3], reference_logits(model, history))
        history = [*history, sampled[3]]
        sampled, logits = driver.step({3: 1})
    assert_close(logits[3], reference_logits(model, history))


@pytest.mark.parametrize("name", ["grouped", "llama3_rope"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 34), (7, 13, 17), (36, 1), (5, 8, 8, 16)], ids=str)
def test_prefill_in_odd_chunks_gives_the_logits_of_transformers(
    name: str, chunks: tuple[int, ...], tiny_llama: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = tiny_llama(**CONFIGS[name])
    driver = make_driver(directory)
    prompt = tokens(37, seed=2)
    driver.enter(0, prompt)
    logits: dict[int, torch.Tensor] = {}
    for chunk in chunks:
        assert not logits
        _, logits = driver.step({0: chunk})
    assert_close(logits[0], reference_logits(model, prompt))


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_mixed_batches_of_prefill_chunks_and_decode_give_the_logits_of_transformers(
    page_size: int, tiny_llama: Callable[..., Any], make_driver: Any
) -> None:
    directory, model = tiny_llama()
    driver = make_driver(directory, page_size=page_size)
    histories = {slot: tokens(length, seed=slot) for slot, length in {0: 90, 1: 3, 2: 40, 5: 1, 9: 61}.items()}
    for slot, history in histories.items():
        driver.enter(slot, history)
    # Rows enter in any order, are chunked, decode beside prefills, and are left out of steps.
    steps = [{2: 17, 0: 90}, {1: 3, 2: 11, 0: 1}, {0: 1, 5: 1, 2: 12, 1: 1, 9: 61}, {9: 1, 1: 1, 0: 1}, {5: 1, 2: 1, 9: 1}]
    for rows in steps:
        sampled, logits = driver.step(rows)
        for slot, row_logits in logits.items():
            assert_close(row_logits, reference_logits(model, histories[slot]))
            histories[slot] = [*histories[slot], sampled[slot]]
    assert {slot: len(history) for slot, history in histories.items()} == {0: 94, 1: 6, 2: 42, 5: 3, 9: 64}


@pytest.mark.parametrize("num_tokens", [17, 20, 24, 25], ids=str)
def test_a_fork_goes_on_from_the_prompt_of_another(num_tokens: int, tiny_llama: Callable[..., Any], make_driver: Any) -> None:
    """The source has outputs of its own in the last page by then, and goes on beside its forks."""
    directory, model = tiny_llama()
    driver = make_driver(directory)
    prompt = tokens(num_tokens, seed=5)
    driver.enter(0, prompt)
    sampled, _ = driver.step({0: num_tokens})
    histories = {0: [*prompt, sampled[0]], 1: prompt, 2: prompt}
    for slot in (1, 2):
        driver.fork(slot, 0, prompt)
    for step in range(5):
        sampled, logits = driver.step({0: 1, 1: 1, 2: 1})
        for slot, history in histories.items():
            assert_close(logits[slot], reference_logits(model, history))
            # Each goes another way.
            token_id = (sampled[slot] + slot * (step + 1)) % 251
            driver.force(slot, token_id)
            histories[slot] = [*history, token_id]


def test_a_freed_slot_and_its_pages_serve_the_next_sequence(tiny_llama: Callable[..., Any], make_driver: Any) -> None:
    directory, model = tiny_llama()
    driver = make_driver(directory, kv_cache_tokens=256)
    for seed in range(3):
        prompt = tokens(20 + seed, seed=seed)
        driver.enter(4, prompt)
        _, logits = driver.step({4: len(prompt)})
        assert_close(logits[4], reference_logits(model, prompt))
        driver.free(4)


def test_a_row_is_the_same_alone_and_among_neighbours_in_float32(tiny_llama: Callable[..., Any], make_driver: Any) -> None:
    directory, _ = tiny_llama()
    prompts = {slot: tokens(10 + 5 * slot, seed=slot) for slot in range(16)}
    together = make_driver(directory).generate(prompts, 12)
    driver = make_driver(directory)
    alone = {slot: driver.generate({slot: prompt}, 12)[slot] for slot, prompt in prompts.items()}
    assert together == alone


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_bfloat16_stays_near_float32(dtype: str, tiny_llama: Callable[..., Any], make_driver: Any) -> None:
    directory, model = tiny_llama()
    driver = make_driver(directory, dtype=dtype)
    prompt = tokens(33, seed=3)
    driver.enter(0, prompt)
    _, logits = driver.step({0: 20})
    _, logits = driver.step({0: 13})
    theirs = reference_logits(model, prompt)
    # bfloat16 keeps 8 bits: 1 % of the logits' spread is what its rounding leaves over three layers.
    assert float((logits[0] - theirs).abs().mean()) < 0.02 * float(theirs.std())
