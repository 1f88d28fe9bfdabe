"""Goal: a family computes on the GPU path what it computes in torch. Method: tiny random checkpoints in float32, the same plans to
two runners, one of which computes with Triton's kernels under the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.interpreted.running import make_driver, mixed_steps
from tests.parity.families import FAMILIES, assert_near

ONE_OF_A_KIND = ("llama", "qwen3_moe", "gemma2", "gemma3", "olmo2", "phi3 longrope", "smollm3 windows", "granite", "gpt_oss")
"""Between them: every operation, bias, window, soft cap, sink, norm of heads and of rows, scaled residual, mixture of each kind."""


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_the_same_plans_give_the_tokens_and_logits_of_torch(name: str, checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint(name)
    tokens, logits = mixed_steps(make_driver(directory, "triton"))
    torch_tokens, torch_logits = mixed_steps(make_driver(directory, "torch"))
    assert tokens == torch_tokens
    assert_near("torch", torch.stack(logits), torch.stack(torch_logits))


def test_the_list_above_names_families() -> None:
    assert set(ONE_OF_A_KIND) <= FAMILIES.keys()
