"""Goal: logprobs of prompts and outputs are those of transformers, on both backends, and the same bits however a prompt is cut.

Sampling is made as unlike the model's own distribution as it can be: logprobs are of what the model gave, not of what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from headrace.v1.common_pb2 import LogitBias, TokenLogprobs

TEXT = "The capital of France is Paris. Once upon a time there was a miller whose wheel stood still, for the brook had run dry."
NUM_TOP = 5
LOGPROB_DIFFERENCE_MAX = {"torch": 1e-4, "native": 0.4}
"""Measured: 2e-5, float32 in another order of sums; and 0.30, the native kernels' int8 activations (0.066 in the mean)."""
MEAN_DIFFERENCE_MAX = {"torch": 3e-5, "native": 0.08}


@pytest.fixture(scope="module")
def prompt(default_model_directory: Path) -> list[int]:
    tokenizer = Tokenizer.from_file(str(default_model_directory / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(TEXT).ids
    return ids


@pytest.fixture(scope="module")
def theirs(reference_smollm2: Any, prompt: list[int]) -> torch.Tensor:
    """Logprobs at each position of the prompt, by transformers: `[num_tokens, vocab_size]`."""
    with torch.inference_mode():
        found: torch.Tensor = torch.log_softmax(reference_smollm2(torch.tensor([prompt])).logits[0].double(), dim=-1)
    return found


@pytest.fixture
def driver(backend: str, default_model_directory: Path, make_driver: Callable[..., Any]) -> Any:
    return make_driver(default_model_directory, backend=backend, page_size=32)


def told(driver: Any, prompt: list[int], chunks: list[int]) -> tuple[TokenLogprobs, TokenLogprobs]:
    """Of the prompt, over all its chunks, and of the token sampled behind it."""
    biases = [LogitBias(token_id=7, bias=100.0)]
    driver.enter(0, prompt, logprobs=NUM_TOP, prompt_logprobs=NUM_TOP, temperature=1.5, repetition_penalty=2.0, logit_bias=biases)
    whole = TokenLogprobs()
    for chunk in chunks:
        sampled, _ = driver.step({0: chunk})
        whole.MergeFrom(driver.result.prompt_logprobs)
    assert sampled == {0: 7}
    driver.free(0)
    return whole, driver.result.logprobs


def test_prompts_and_outputs_have_the_logprobs_of_transformers(
    backend: str, driver: Any, prompt: list[int], theirs: torch.Tensor
) -> None:
    of_prompt, of_output = told(driver, prompt, [len(prompt)])
    expected = torch.cat((theirs[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1), theirs[-1, 7:8]))
    found = torch.tensor([*of_prompt.logprobs, *of_output.logprobs], dtype=torch.float64)
    assert len(of_prompt.logprobs) == len(prompt) - 1
    differences = (found - expected).abs()
    assert float(differences.max()) < LOGPROB_DIFFERENCE_MAX[backend]
    assert float(differences.mean()) < MEAN_DIFFERENCE_MAX[backend]
    for token_ids, values, rows in (
        (of_prompt.top_token_ids, of_prompt.top_logprobs, theirs[:-1]),
        (of_output.top_token_ids, of_output.top_logprobs, theirs[-1:]),
    ):
        ids = torch.tensor(list(token_ids)).view(-1, NUM_TOP)
        likely = torch.tensor(list(values), dtype=torch.float64).view(-1, NUM_TOP)
        assert float((likely - rows.gather(1, ids)).abs().max()) < LOGPROB_DIFFERENCE_MAX[backend]
        assert float((likely - rows.topk(NUM_TOP).values).abs().mean()) < MEAN_DIFFERENCE_MAX[backend]
        assert bool((likely[:, :-1] >= likely[:, 1:]).all())
        assert all(math.exp(value) <= 1.0 for value in values)


def test_chunks_change_nothing(backend: str, driver: Any, prompt: list[int]) -> None:
    whole = told(driver, prompt, [len(prompt)])
    cut = told(driver, prompt, [5, 1, 13, len(prompt) - 19])
    for ours, others in zip(whole, cut, strict=True):
        assert list(ours.top_token_ids) == list(others.top_token_ids)
        if backend == "native":
            assert list(ours.logprobs) == list(others.logprobs)
        assert list(ours.logprobs) == pytest.approx(list(others.logprobs), abs=LOGPROB_DIFFERENCE_MAX["torch"])
