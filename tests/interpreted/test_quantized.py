"""Goal: quantised weights stay as the file has them on the GPU path, and give what torch computes with them unpacked.

Method: one checkpoint of one layer in every form, in float32, the same plans to both. Matrices alone: test_quantized_matrices.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interpreted.quantizing import FORMS, assert_agree, quantize_checkpoint
from tests.interpreted.running import load, mixed_steps, options_for
from tests.parity.conftest import Driver

pytestmark = pytest.mark.timeout(240)

UNPACKED = {"gptq act-order": "its groups are not of neighbours (act-order)", "fp8 e5m2": "eight-bit floats of type e5m2"}
LAYER = "model.layers.0."
MATRICES = [f"{LAYER}self_attn.{name}_proj.weight" for name in "qkvo"] + [
    f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down")
]


@pytest.fixture
def quantized(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Give a checkpoint with biases, quantised in a form."""

    def make(form: str) -> Path:
        source = checkpoint("llama" if form == "gguf" else "llama biases", num_hidden_layers=1, intermediate_size=160)
        return quantize_checkpoint(source, tmp_path, form)

    return make


@pytest.mark.parametrize("form", [*FORMS, "gguf"])
def test_the_same_plans_give_the_tokens_and_logits_of_torch(form: str, quantized: Callable[[str], Path]) -> None:
    directory = quantized(form)
    runner, report = load(options_for(directory, "triton"))
    tokens, logits = mixed_steps(Driver(runner))
    torch_runner, torch_report = load(options_for(directory, "torch"))
    torch_tokens, torch_logits = mixed_steps(Driver(torch_runner))
    assert_agree(form, (tokens, logits), (torch_tokens, torch_logits))
    assert report.unpacked == (dict.fromkeys(MATRICES, UNPACKED[form]) if form in UNPACKED else {})
    share = report.memory.weight_bytes / torch_report.memory.weight_bytes
    assert share == 1 if form in UNPACKED else share < 2 / 3
