"""Goal: quantised tensors reach a backend as the file has them, rows in Hugging Face order, and the plain path as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from headrace.errors import ModelError
from services.worker.quantization.gguf_blocks import unpack_blocks
from services.worker.weights import RAW_BLOCK_TYPES, WeightLoader
from tests.unit.worker.quantization.joined import joined

Write = Callable[[Mapping[str, tuple[str, np.ndarray]]], Path]
LAYER = "model.layers.0."
QUERY, VALUE, DOWN = LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.v_proj.weight", LAYER + "mlp.down_proj.weight"


def packed(type_name: str, shape: tuple[int, int]) -> tuple[str, np.ndarray]:
    values = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    return type_name, quantize(values, GGMLQuantizationType[type_name.upper()])


def in_hf_order(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Row `2i + half` of a head of the file is row `half * head_dim / 2 + i` of Hugging Face's."""
    head_dim = len(rows) // num_heads
    order = [head * head_dim + 2 * i + half for head in range(num_heads) for half in (0, 1) for i in range(head_dim // 2)]
    return rows[order]


def test_mixed_types_of_one_file_are_each_given_as_they_are(write_gguf: Write) -> None:
    tensors = {
        "blk.0.attn_q.weight": packed("q8_0", (32, 64)),
        "blk.0.attn_v.weight": packed("q5_1", (16, 64)),
        "blk.0.ffn_down.weight": ("f16", np.random.default_rng(5).standard_normal((64, 128)).astype(np.float16)),
    }
    weights = WeightLoader(write_gguf(tensors), dtype=torch.float32)
    query, value = (weights.take_quantized(QUERY, (32, 64), multiple=8), weights.take_quantized(VALUE, (16, 64), multiple=8))
    assert query is not None and value is not None
    query, value = joined(query), joined(value)
    assert (query.bits, query.group_size, query.zero) == (8, 32, 128)
    expected = dequantize(in_hf_order(tensors["blk.0.attn_q.weight"][1], 4), GGMLQuantizationType.Q8_0)
    assert np.array_equal(query.dequantize(), expected)
    assert (value.bits, value.zero) == (5, None)
    # A plain tensor is not taken by asking for it as a quantised one.
    assert weights.take_quantized(DOWN, (64, 128), multiple=8) is None
    assert weights.take_blocks(DOWN, (64, 128), multiple=8) is None
    assert np.array_equal(weights.take(DOWN, (64, 128)).numpy(), tensors["blk.0.ffn_down.weight"][1].astype(np.float32))
    weights.check_all_taken()


@pytest.mark.parametrize("type_name", RAW_BLOCK_TYPES)
def test_raw_blocks_are_in_hugging_face_row_order(write_gguf: Write, type_name: str) -> None:
    tensor = packed(type_name, (32, 64))
    weights = WeightLoader(write_gguf({"blk.0.attn_q.weight": tensor}), dtype=torch.float32)
    taken = weights.take_blocks(QUERY, (32, 64), multiple=8)
    assert taken is not None
    assert taken[0] == type_name
    assert np.array_equal(np.concatenate(list(taken[1])), in_hf_order(tensor[1], 4))
    assert weights.num_bytes == tensor[1].nbytes
    weights.check_all_taken()


def test_a_type_without_raw_blocks_is_left_for_the_common_form(write_gguf: Write) -> None:
    weights = WeightLoader(write_gguf({"blk.0.attn_v.weight": packed("q5_0", (16, 64))}), dtype=torch.float32)
    assert weights.take_blocks(VALUE, (16, 64), multiple=8) is None
    assert weights.take_quantized(VALUE, (16, 64), multiple=8) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type_name", ["q4_1", "q5_0", "q8_0"])
def test_the_plain_path_gives_the_same_numbers(write_gguf: Write, type_name: str, dtype: torch.dtype) -> None:
    tensor = packed(type_name, (16, 64))
    weights = WeightLoader(write_gguf({"blk.0.attn_v.weight": tensor}), dtype=dtype)
    expected = torch.from_numpy(unpack_blocks(tensor[1], type_name).dequantize()).to(dtype)
    assert torch.equal(weights.take(VALUE, (16, 64)), expected)


@pytest.mark.parametrize("method", ["take_quantized", "take_blocks"])
def test_shape_and_presence_are_checked_as_for_plain_tensors(write_gguf: Write, method: str) -> None:
    weights = WeightLoader(write_gguf({"blk.0.attn_v.weight": packed("q8_0", (16, 64))}), dtype=torch.float32)
    take = partial(getattr(weights, method), multiple=8)
    with pytest.raises(ModelError, match=r"v_proj\.weight has shape \[16, 64\], but config\.json asks for \[32, 64\]"):
        take(VALUE, (32, 64))
    assert take(VALUE, (16, 64)) is not None
    with pytest.raises(ModelError, match=r"v_proj\.weight \[16, 64\] is missing"):
        take(VALUE, (16, 64))


def test_a_shape_that_the_file_does_not_have_is_refused_before_there_is_a_place_for_it(write_gguf: Write) -> None:
    tensors = {"blk.0.attn_v.weight": packed("q8_0", (16, 64)), "blk.0.attn_q.weight": packed("q8_0", (16, 64))}
    weights = WeightLoader(write_gguf(tensors), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"asks for \[1099511627776, 64\]"):
        weights.take_stacked([(VALUE, (16, 64)), (QUERY, (1 << 40, 64))])


def test_progress_is_told_after_each_tensor(write_gguf: Write) -> None:
    tensors = {"blk.0.attn_v.weight": packed("q8_0", (16, 64)), "blk.0.ffn_down.weight": packed("q4_1", (64, 128))}
    told: list[tuple[int, int]] = []
    weights = WeightLoader(write_gguf(tensors), dtype=torch.float32, on_progress=lambda *values: told.append(values))
    weights.take(VALUE, (16, 64))
    blocks = weights.take_blocks(DOWN, (64, 128), multiple=8)
    assert blocks is not None
    assert len(list(blocks[1])) == 8
    in_all = 16 * 64 + 64 * 128
    assert told == [(16 * 64, in_all), (64 * 128, in_all)]
