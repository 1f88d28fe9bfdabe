"""Goal: the native CPU kernels compute what transformers does, and a row's numbers are the same bits however it is computed.

Method: the default model with its own 4-bit weights against float32 on the same dequantised weights, teacher-forced; then one
sequence alone, among others, in chunks, token by token and after moving to other pages, compared bit by bit.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from headrace.errors import ConfigError
from services.worker.native_draw import NativeDraw

pytestmark = pytest.mark.usefixtures("native_library")

MEAN_KL_MAX = 5e-3
"""Mean over positions of KL(float32 ‖ native), in nats: what int8 activations cost beside the file's exact weights."""


@pytest.fixture(scope="module")
def native_driver(native_library: None, default_model_directory: Path, make_driver: Callable[..., Any]) -> Any:
    return make_driver(default_model_directory, backend="native", dtype="auto", page_size=32, kv_cache_tokens=32768)


def tokens(num_tokens: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 49152, (num_tokens,), generator=generator).tolist()


def test_native_stays_near_float32(native_driver: Any, reference_smollm2: Any, default_model_directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(default_model_directory / "tokenizer.json"))
    text = tokenizer.encode(inspect.cleandoc(argparse.ArgumentParser.__doc__ + statistics.__doc__)).ids[:256]
    with torch.inference_mode():
        theirs = torch.log_softmax(reference_smollm2(torch.tensor([text])).logits[0].double(), dim=-1)
    native_driver.enter(0, text[:1])
    divergences = []
    for position, token_id in enumerate(text):
        if position:
            native_driver.force(0, token_id)
        _, logits = native_driver.step({0: 1})
        ours = torch.log_softmax(logits[0].double(), dim=-1)
        divergences.append(float((theirs[position].exp() * (theirs[position] - ours)).sum()))
    native_driver.free(0)
    assert 0 < sum(divergences) / len(divergences) < MEAN_KL_MAX


def last_logits(driver: Any, prompt: list[int], chunks: list[int], slot: int = 0) -> torch.Tensor:
    driver.enter(slot, prompt)
    for chunk in chunks:
        _, logits = driver.step({slot: chunk})
    driver.free(slot)
    return logits[slot]


@pytest.mark.parametrize(
    "chunks", [[200, 50], [1] * 250, [249, 1], [128, 122], [33, 31, 97, 88, 1], [1, 248, 1]], ids=lambda chunks: str(chunks[:5])
)
def test_chunks_change_no_bit(native_driver: Any, chunks: list[int]) -> None:
    """So prefill and decode of a position agree, and a sequence computed again after preemption goes on as before."""
    prompt = tokens(250, seed=6)
    assert torch.equal(last_logits(native_driver, prompt, [250]), last_logits(native_driver, prompt, chunks))


class ScarceMemory:
    """The library, which finds memory for steps of up to so many tokens."""

    def __init__(self, library: Any, max_tokens: int) -> None:
        self._library = library
        self.max_tokens = max_tokens
        self.attempts: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def hr_run(self, program: Any, step: Any) -> Any:
        self.attempts.append(step.num_tokens)
        return step.num_tokens <= self.max_tokens and self._library.hr_run(program, step)


def test_a_step_that_finds_no_memory_is_computed_in_halves_and_changes_no_bit(
    native_driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and decode rows lie across the borders of the parts, and one part samples nothing."""
    prompts = {slot: tokens(num_tokens, seed=80 + slot) for slot, num_tokens in enumerate((5, 130, 9, 40))}

    def compute() -> tuple[list[dict[int, int]], list[torch.Tensor]]:
        for slot, prompt in prompts.items():
            native_driver.enter(slot, prompt)
        native_driver.step({2: 8})
        steps = [native_driver.step({2: 1, 0: 5, 1: 130, 3: 40}), native_driver.step(dict.fromkeys(prompts, 1))]
        for slot in prompts:
            native_driver.free(slot)
        return [found for found, _ in steps], [logits[slot] for _, logits in steps for slot in prompts]

    expected, logits = compute()
    network = native_driver.network._network
    scarce = ScarceMemory(network._library, 50)
    monkeypatch.setattr(network, "_library", scarce)
    found, part_logits = compute()
    assert found == expected
    assert torch.equal(torch.stack(part_logits), torch.stack(logits))
    assert scarce.attempts == [8, 176, 88, 44, 44, 88, 44, 44, 4]


def test_a_small_step_that_finds_no_memory_says_what_to_do(native_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = native_driver.network._network
    scarce = ScarceMemory(network._library, 0)
    monkeypatch.setattr(network, "_library", scarce)
    prompt = tokens(20, seed=1)
    native_driver.enter(0, prompt)
    with pytest.raises(ConfigError, match=r"no memory for a step of 10 tokens, .* worker.kv_cache_bytes is too large"):
        native_driver.step({0: 20})
    # What is left of it is over with the worker; here the next test goes on.
    native_driver.runner.reset()


def test_neighbours_change_no_bit(native_driver: Any) -> None:
    prompts = {slot: tokens(20 + 9 * slot, seed=slot) for slot in range(17)}
    alone = {slot: last_logits(native_driver, prompt, [len(prompt)]) for slot, prompt in prompts.items()}
    for slot, prompt in prompts.items():
        native_driver.enter(slot, prompt)
    for slot in list(prompts)[1::2]:
        # Half of them decode their last token while the others prefill.
        native_driver.step({slot: len(prompts[slot]) - 1})
    _, together = native_driver.step({slot: 1 if slot % 2 else len(prompt) for slot, prompt in prompts.items()})
    for slot in prompts:
        native_driver.free(slot)
        assert torch.equal(alone[slot], together[slot]), slot


def test_greedy_text_is_the_same_alone_and_together(native_driver: Any) -> None:
    prompts = {slot: tokens(30 + slot, seed=40 + slot) for slot in range(8)}
    together = native_driver.generate(prompts, 12)
    alone = {slot: native_driver.generate({slot: prompt}, 12)[slot] for slot, prompt in prompts.items()}
    assert together == alone


SAMPLINGS: list[dict[str, float]] = [{}, {"top_p": 0.9, "top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.2}]


def test_drawn_text_is_the_same_alone_and_beside_greedy_rows(native_driver: Any) -> None:
    """Steps without and with other rows, among them rows that nothing is drawn for; what draws is the kernel."""
    assert isinstance(native_driver.runner._draw, NativeDraw)

    def drawn(slots: list[int]) -> dict[int, list[int]]:
        for slot in slots:
            sampling = {"temperature": 0.0} if slot % 2 else {"temperature": 0.9} | SAMPLINGS[slot // 2]
            native_driver.enter(slot, tokens(20 + slot, seed=60 + slot), **sampling)
        outputs = [native_driver.step({slot: 20 + slot for slot in slots})[0]]
        outputs += [native_driver.step(dict.fromkeys(slots, 1))[0] for _ in range(9)]
        for slot in slots:
            native_driver.free(slot)
        return {slot: [tokens_of[slot] for tokens_of in outputs] for slot in slots}

    together = drawn(list(range(2 * len(SAMPLINGS))))
    for slot in (0, 2, 4, 6, 8):
        assert drawn([slot]) == {slot: together[slot]}


def test_8_bit_pages_change_no_bit_either(default_model_directory: Path, make_driver: Callable[..., Any]) -> None:
    """In chunks, beside others, by a fork (which shares pages and copies one), and after a failed row's pages were wiped."""
    options = {"backend": "native", "dtype": "auto", "page_size": 32, "kv_cache_dtype": "fp8_e4m3"}
    driver = make_driver(default_model_directory, **options)
    prompt = tokens(250, seed=6)
    whole = last_logits(driver, prompt, [250])
    for chunks in ([249, 1], [33, 31, 97, 88, 1]):
        assert torch.equal(last_logits(driver, prompt, chunks), whole), chunks

    others = {slot: tokens(20 + 9 * slot, seed=slot) for slot in range(1, 6)}
    driver.enter(0, prompt)
    for slot, other in others.items():
        driver.enter(slot, other)
    driver.step({0: 249, **{slot: len(other) - 1 for slot, other in others.items()}})
    driver.fork(6, 0, prompt)
    _, together = driver.step(dict.fromkeys([0, *others, 6], 1))
    assert torch.equal(together[0], whole)
    assert torch.equal(together[6], whole)
    for slot in (0, *others, 6):
        driver.free(slot)

    for layer_pages in driver.network._network._pages:
        layer_pages[...] = 0x7F
    driver.network.clear_pages(torch.arange(len(layer_pages)))
    assert torch.equal(last_logits(driver, prompt, [250]), whole)
