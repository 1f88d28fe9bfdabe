"""Goal: speculation changes no token, greedy or sampled, alone or in a batch, and does save steps.

Method: the scheduler's core over the real runner on the native kernels, whose rows do not depend on how they are computed. The
same requests without drafts, with all that are found, and with those that seem worth it, whatever the clock says of that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bench.micro.speculation import Lane
from services.worker.drafting.factory import make_speculation
from services.worker.model_runner import ModelRunner

pytestmark = pytest.mark.usefixtures("native_library")

NUM_OUTPUT_TOKENS = 96
NUM_PROMPT_TOKENS = 250


@pytest.fixture(scope="module")
def runner(native_library: None, default_model_directory: Path, make_driver: Callable[..., Any]) -> ModelRunner:
    driver = make_driver(default_model_directory, backend="native", dtype="auto", page_size=32, kv_cache_tokens=8192)
    found: ModelRunner = driver.runner
    found.speculation = make_speculation("auto", max_num_drafts=8, limits=found.limits, now_ns=time.monotonic_ns)
    return found


@pytest.fixture(scope="module")
def prompts(default_model_directory: Path) -> list[list[int]]:
    """Texts that begin to repeat themselves, each from another place on."""
    tokenizer = Tokenizer.from_file(str(default_model_directory / "tokenizer.json"))
    text = tokenizer.encode((statistics.__doc__ or "").strip()).ids[: NUM_PROMPT_TOKENS // 2]
    return [text + text[: NUM_PROMPT_TOKENS // 2 - 25 * place] for place in range(4)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_outputs_are_those_without_drafts(runner: ModelRunner, prompts: list[list[int]], temperature: float) -> None:
    off, ngram, auto = (
        Lane(runner).generate(prompts, num_tokens=NUM_OUTPUT_TOKENS, temperature=temperature, method=method)
        for method in ("off", "ngram", "auto")
    )
    assert off.outputs == ngram.outputs == auto.outputs
    assert [len(output) for output in off.outputs] == [NUM_OUTPUT_TOKENS] * len(prompts)
    # The comparison says something only if some guesses stood and some fell.
    assert off.num_drafts == 0
    assert 0 < ngram.num_accepted < ngram.num_drafts
    assert ngram.num_steps < off.num_steps
    print(f"\n{off.num_steps} steps, {ngram.num_steps} with {ngram.num_drafts} drafts, {ngram.num_accepted} of them right")


def test_a_request_alone_has_the_output_that_it_has_among_drafting_neighbours(
    runner: ModelRunner, prompts: list[list[int]]
) -> None:
    together = Lane(runner).generate(prompts, num_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, method="ngram")
    alone = Lane(runner).generate(prompts[:1], num_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, method="off")
    assert together.outputs[0] == alone.outputs[0]
