"""Goal: blocks in the common form stand for the very numbers that the gguf library reads from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from headrace.models.gguf_file import SUPPORTED_TYPES
from services.worker.quantization.gguf_blocks import BLOCK_LAYOUTS, unpack_blocks
from services.worker.quantization.quantized_matrix import QuantizedMatrix

FACTORS = {
    "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "iq4_nl": [0],
    "q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq4_xs": [0],
}  # fmt: skip
"""Where the float16 fields of a block are; everything else may be any bits."""


def random_rows(dtype_name: str, *, num_rows: int, blocks_per_row: int) -> np.ndarray:
    """Packed rows of random bits, with finite factors of either sign and all sizes, subnormal ones included."""
    generator = np.random.default_rng(num_rows)
    blocks = generator.integers(0, 256, (num_rows * blocks_per_row, BLOCK_LAYOUTS[dtype_name].num_bytes), dtype=np.uint8)
    for place in FACTORS[dtype_name]:
        factors = generator.standard_normal(len(blocks)) * 10.0 ** generator.integers(-7, 3, len(blocks))
        blocks[:, place : place + 2] = factors.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("dtype_name", BLOCK_LAYOUTS)
@pytest.mark.parametrize(("num_rows", "blocks_per_row"), [(1, 1), (5, 3), (60, 40)])
def test_numbers_are_those_of_the_gguf_library(dtype_name: str, num_rows: int, blocks_per_row: int) -> None:
    rows = random_rows(dtype_name, num_rows=num_rows, blocks_per_row=blocks_per_row)
    matrix = unpack_blocks(rows, dtype_name)
    assert np.array_equal(matrix.dequantize(), dequantize(rows, GGMLQuantizationType[dtype_name.upper()]))
    assert int(matrix.codes.max()) < 2**matrix.bits


@pytest.mark.parametrize("dtype_name", BLOCK_LAYOUTS)
def test_only_the_sum_with_a_minimum_is_rounded(dtype_name: str) -> None:
    matrix = unpack_blocks(random_rows(dtype_name, num_rows=4, blocks_per_row=2), dtype_name)
    scales, codes = (values.astype(np.float64) for values in (np.repeat(matrix.scales, matrix.group_size, axis=1), matrix.codes))
    if matrix.minimums is None:
        exact = scales * (codes - float(matrix.zero or 0))
        assert np.array_equal(matrix.dequantize().astype(np.float64), exact)
    else:
        assert np.array_equal((scales * codes).astype(np.float32), scales * codes)
        exact = scales * codes + np.repeat(matrix.minimums.astype(np.float64), matrix.group_size, axis=1)
        assert np.array_equal(matrix.dequantize(), exact.astype(np.float32))


def test_every_quantised_type_that_can_be_read_has_a_layout() -> None:
    assert {name.lower() for name in SUPPORTED_TYPES} - {"f32", "f16", "bf16"} == set(BLOCK_LAYOUTS)
    for name, layout in BLOCK_LAYOUTS.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] == (layout.num_values, layout.num_bytes)


def test_smaller_groups_are_the_same_matrix() -> None:
    generator = np.random.default_rng(1)
    for minimums in (None, generator.standard_normal((3, 2)).astype(np.float32)):
        matrix = QuantizedMatrix(
            codes=generator.integers(0, 16, (3, 64), dtype=np.uint8),
            bits=4,
            group_size=32,
            scales=generator.standard_normal((3, 2)).astype(np.float16),
            zero=8 if minimums is None else None,
            minimums=minimums,
        )
        split = matrix.split_groups(16)
        assert (split.group_size, split.scales.shape) == (16, (3, 4))
        assert np.array_equal(split.dequantize(), matrix.dequantize())
        assert math.prod(matrix.shape) + matrix.scales.nbytes <= matrix.num_bytes
