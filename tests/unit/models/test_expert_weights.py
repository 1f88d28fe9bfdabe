"""Goal: packed experts read one by one, exactly. Method: small files, each value computed from the format's definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from headrace.errors import ModelError
from headrace.models.expert_weights import with_single_experts
from headrace.models.weights import open_weights

PREFIX = "model.layers.0.mlp.experts"
NUM_EXPERTS, INNER, WIDTH = 3, 32, 64
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def plain() -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(1)
    shapes = {
        f"{PREFIX}.gate_up_proj": (NUM_EXPERTS, WIDTH, 2 * INNER),
        f"{PREFIX}.gate_up_proj_bias": (NUM_EXPERTS, 2 * INNER),
        f"{PREFIX}.down_proj": (NUM_EXPERTS, INNER, WIDTH),
        f"{PREFIX}.down_proj_bias": (NUM_EXPERTS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def packed() -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(2)
    tensors = {name: values for name, values in plain().items() if not name.endswith("_proj")}
    for name, num_rows, num_blocks in (("gate_up_proj", 2 * INNER, WIDTH // 32), ("down_proj", WIDTH, INNER // 32)):
        shape = (NUM_EXPERTS, num_rows, num_blocks)
        tensors[f"{PREFIX}.{name}_blocks"] = generator.integers(0, 256, (*shape, 16), dtype=np.uint8)
        tensors[f"{PREFIX}.{name}_scales"] = generator.integers(0, 252, shape, dtype=np.uint8)
    return tensors


def opened(directory: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Any:
    save_file(tensors, directory / "model.safetensors")
    return with_single_experts(open_weights(directory))


def test_other_weights_are_left_as_they_are(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert with_single_experts(weights) is weights


def test_plain_experts_are_cut_and_turned(tmp_path: Path) -> None:
    tensors = plain()
    weights = opened(tmp_path, tensors)
    gate_up = tensors[f"{PREFIX}.gate_up_proj"]
    expected = {
        "gate_proj.weight": gate_up[2, :, ::2].T,
        "up_proj.weight": gate_up[2, :, 1::2].T,
        "down_proj.weight": tensors[f"{PREFIX}.down_proj"][2].T,
        "gate_proj.bias": tensors[f"{PREFIX}.gate_up_proj_bias"][2, ::2],
        "up_proj.bias": tensors[f"{PREFIX}.gate_up_proj_bias"][2, 1::2],
        "down_proj.bias": tensors[f"{PREFIX}.down_proj_bias"][2],
    }
    for name, values in expected.items():
        info = weights.info(f"{PREFIX}.2.{name}")
        assert (info.shape, info.dtype_name) == (values.shape, "f32")
        np.testing.assert_array_equal(weights.load(f"{PREFIX}.2.{name}"), values)
        np.testing.assert_array_equal(weights.load_item(f"{PREFIX}.2.{name}", 5), values[5])
        assert weights.load_packed(f"{PREFIX}.2.{name}").tobytes() == np.ascontiguousarray(values).tobytes()
    assert len(weights.names()) == NUM_EXPERTS * len(expected) + 1
    np.testing.assert_array_equal(weights.load("model.norm.weight"), tensors["model.norm.weight"])
    assert weights.load_item("model.norm.weight", 3) == tensors["model.norm.weight"][3]
    assert weights.load_packed("model.norm.weight").shape == (1, 4 * WIDTH)
    assert weights.metadata == {}


def test_mxfp4_is_expanded_to_the_last_bit(tmp_path: Path) -> None:
    tensors = packed()
    weights = opened(tmp_path, tensors)
    info = weights.info(f"{PREFIX}.1.up_proj.weight")
    assert (info.shape, info.dtype_name) == ((INNER, WIDTH), "mxfp4")
    bits = weights.load(f"{PREFIX}.1.up_proj.weight")
    ours = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    blocks, scales = tensors[f"{PREFIX}.gate_up_proj_blocks"][1], tensors[f"{PREFIX}.gate_up_proj_scales"][1]
    for row in (0, 7, INNER - 1):
        for column in range(WIDTH):
            byte = int(blocks[2 * row + 1, column // 32, column % 32 // 2])
            code = byte >> 4 if column % 2 else byte & 15
            sign = -1.0 if code & 8 else 1.0
            assert ours[row, column] == sign * MAGNITUDES[code & 7] * 2.0 ** (int(scales[2 * row + 1, column // 32]) - 127)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("down_proj_blocks", (NUM_EXPERTS, WIDTH, 1, 8), r"down_proj_blocks has shape \[3, 64, 1, 8\]"),
        ("down_proj_blocks", (NUM_EXPERTS, WIDTH, 16), "down_proj_blocks has shape"),
        ("down_proj_scales", (NUM_EXPERTS, WIDTH, 2), "down_proj_scales is missing or does not belong to"),
        ("down_proj_scales", None, "down_proj_scales is missing or does not belong to"),
        ("down_proj_bias", (NUM_EXPERTS, WIDTH, 1), "down_proj_bias has shape"),
    ],
)
def test_packed_tensors_that_cannot_be_are_refused(name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    tensors = packed()
    del tensors[f"{PREFIX}.{name}"]
    if shape is not None:
        tensors[f"{PREFIX}.{name}"] = np.zeros(shape, np.uint8)
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, tensors)
