"""Goal: matrices in every quantised form are packed for the kernels and multiplied as what they stand for, alone and stacked.

Method: random codes and scales through the packing, beside float32 products with what the file says the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kernels.quantized_matmul.reference import GPTQ_ORDER, pack_words
from services.worker.device import HostDevice
from services.worker.layers.linear import Linear
from services.worker.layers.triton_linear import Float8Segment, Int8Segment, PlainSegment, QuantizedLinear, W4Segment, W8Segment
from services.worker.layers.triton_ops import TritonOps
from services.worker.layers.triton_packing import _words
from services.worker.quantization.gguf_blocks import BLOCK_LAYOUTS
from services.worker.quantization.quantized_matrix import Float8Matrix, QuantizedMatrix
from tests.kernels.comparing import assert_matches, normal

Stored = QuantizedMatrix | Float8Matrix | torch.Tensor


class Loader:
    """A `WeightLoader` over matrices at hand; quantised ones come in two runs of rows."""

    def __init__(self, matrices: Mapping[str, Stored], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.unpacked: dict[str, str] = {}
        self._matrices = matrices

    def is_quantized(self, name: str) -> bool:
        return not isinstance(self._matrices[name], torch.Tensor)

    def take_quantized(self, name: str, shape: tuple[int, int], *, multiple: int) -> Iterator[QuantizedMatrix] | None:
        matrix = self._matrices[name]
        return rows_of(matrix, multiple) if isinstance(matrix, QuantizedMatrix) else None

    def take_float8(self, name: str, shape: tuple[int, int], *, multiple: int) -> Iterator[Float8Matrix] | None:
        matrix = self._matrices[name]
        return iter([matrix]) if isinstance(matrix, Float8Matrix) else None

    def take(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        return numbers(self._matrices[name]).to(self.dtype)

    def take_stacked(self, parts: Sequence[tuple[str, tuple[int, int]]]) -> torch.Tensor:
        return torch.cat([self.take(*part) for part in parts])


def rows_of(matrix: QuantizedMatrix, first: int) -> Iterator[QuantizedMatrix]:
    for start, stop in pairwise((0, first, matrix.shape[0])):
        rows = slice(start, stop)
        yield QuantizedMatrix(
            codes=matrix.codes[rows],
            bits=matrix.bits,
            group_size=matrix.group_size,
            scales=matrix.scales[rows],
            zero=matrix.zero,
            minimums=None if matrix.minimums is None else matrix.minimums[rows],
            input_type=matrix.input_type,
        )


def codes_of(shape: tuple[int, int], bits: int, group_size: int, zero: int | None, *, dtype: Any = np.float16) -> QuantizedMatrix:
    generator = np.random.default_rng(torch.initial_seed() % 2**32)
    groups = (shape[0], shape[1] // group_size)
    scales = generator.uniform(0.5, 1.5, groups).astype(dtype) / np.array(1 << bits, dtype)
    codes = generator.integers(0, 1 << bits, shape).astype(np.uint8)
    minimums = None if zero is not None else -generator.uniform(0.3, 0.7, groups).astype(dtype)
    return QuantizedMatrix(codes=codes, bits=bits, group_size=group_size, scales=scales, zero=zero, minimums=minimums)


def float8_of(shape: tuple[int, int], block: tuple[int, int], input_type: str = "") -> Float8Matrix:
    codes = normal(*shape).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    scales = (torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) + 0.5).numpy()
    return Float8Matrix(codes, scales, *block, input_type)


def numbers(matrix: Stored) -> torch.Tensor:
    if isinstance(matrix, QuantizedMatrix):
        return torch.from_numpy(matrix.dequantize())
    if isinstance(matrix, torch.Tensor):
        return matrix
    rows, columns = matrix.codes.shape
    scales = torch.from_numpy(matrix.scales).repeat_interleave(matrix.block_rows, 0).repeat_interleave(matrix.block_columns, 1)
    return torch.from_numpy(matrix.codes).view(torch.float8_e4m3fn).float() * scales[:rows, :columns]


def layer_of(*matrices: Stored, dtype: torch.dtype = torch.float32) -> tuple[Any, TritonOps, Loader]:
    """The matrices stacked, by the backend, with what it made them with."""
    by_name = {f"part {index}": matrix for index, matrix in enumerate(matrices)}
    loader = Loader(by_name, dtype)
    ops: Any = TritonOps(loader, HostDevice())  # type: ignore[arg-type]
    return ops.matrix([(name, tuple(numbers(matrix).shape)) for name, matrix in by_name.items()]), ops, loader


def assert_multiplies(layer: Any, *matrices: Stored, dtype: torch.dtype = torch.float32, bound: float | None = None) -> None:
    weight = torch.cat([numbers(matrix) for matrix in matrices])
    x = normal(3, weight.shape[1], dtype=dtype)
    assert_matches(layer(x), (x.double() @ weight.double().T).to(dtype), bound=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCK_LAYOUTS)
def test_every_gguf_type_is_multiplied_as_it_is(name: str, dtype: torch.dtype) -> None:
    form = BLOCK_LAYOUTS[name]
    matrix = codes_of((24, 256), form.bits, form.group_size, form.zero, dtype=form.scale_dtype)
    layer, ops, loader = layer_of(matrix, dtype=dtype)
    assert_multiplies(layer, matrix, dtype=dtype)
    (segment,) = layer.segments
    assert isinstance(segment, W4Segment if form.bits == 4 else W8Segment)
    scale_bytes = matrix.scales.nbytes * (2 if form.zero is None else 1)
    zero_bytes = matrix.scales.size // 2 if form.bits == 4 and form.zero not in (8, None) else 0
    assert ops.num_bytes == 24 * 256 * (4 if form.bits == 4 else 8) // 8 + scale_bytes + zero_bytes
    assert not loader.unpacked


def test_zero_points_of_their_own_are_kept_as_such_where_minimums_say_nothing_else() -> None:
    matrix = codes_of((16, 64), 4, 16, 8)
    zeros = np.random.default_rng(1).integers(0, 16, matrix.scales.shape)
    matrix.scales[3, 1], zeros[3, 1] = 0, 0
    minimums = matrix.scales.astype(np.float32) * -zeros.astype(np.float32)
    matrix = QuantizedMatrix(codes=matrix.codes, bits=4, group_size=16, scales=matrix.scales, minimums=minimums)
    layer, _, _ = layer_of(matrix)
    (segment,) = layer.segments
    assert segment.minimums is None
    assert torch.equal(segment.qzeros, pack_words(torch.from_numpy(zeros.T), GPTQ_ORDER))
    assert_multiplies(layer, matrix)


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "zero", "form"),
    [
        ((20, 64), 4, 16, 8, W8Segment),
        ((16, 36), 4, 36, 8, W8Segment),
        ((16, 40), 4, 40, None, W4Segment),
        ((16, 32), 4, 16, -3, W4Segment),
        ((16, 32), 8, 32, 300, W8Segment),
        ((16, 32), 8, 16, None, W8Segment),
    ],
    ids=["no-whole-words-of-outputs", "none-of-inputs", "one-group", "zero-below-codes", "zero-above-codes", "minimums"],
)
def test_shapes_and_zero_points_that_words_do_not_hold(
    shape: tuple[int, int], bits: int, group_size: int, zero: int | None, form: type
) -> None:
    matrix = codes_of(shape, bits, group_size, zero)
    layer, _, _ = layer_of(matrix)
    assert [type(segment) for segment in layer.segments] == [form]
    assert_multiplies(layer, matrix)


@pytest.mark.parametrize("block", [(1, 200), (160, 200), (128, 128), (16, 32)], ids=str)
def test_eight_bit_floats_are_multiplied_as_they_are(block: tuple[int, int]) -> None:
    matrix = float8_of((160, 200), block)
    layer, _, _ = layer_of(matrix)
    assert [type(segment) for segment in layer.segments] == [W8Segment]
    assert_multiplies(layer, matrix)


def test_inputs_are_quantised_only_where_the_checkpoint_was_made_for_it() -> None:
    """Bounds: rounding inputs to 8 bits, uniform or with 3 bits of mantissa, is off by some 1 % and 3 % of a product's spread."""
    plain = codes_of((24, 64), 8, 64, 128)
    declared = QuantizedMatrix(plain.codes, 8, 64, plain.scales, zero=128, input_type="int8")
    grouped = codes_of((24, 64), 8, 32, 128)
    by_group = QuantizedMatrix(grouped.codes, 8, 32, grouped.scales, zero=128, input_type="int8")
    blocks = float8_of((160, 200), (128, 128), "float8")
    for matrix, form, bound in (
        (plain, W8Segment, None),
        (declared, Int8Segment, 0.02),
        (by_group, W8Segment, None),
        (blocks, Float8Segment, 0.05),
        (float8_of((160, 200), (1, 200), "float8"), W8Segment, None),
    ):
        layer, _, _ = layer_of(matrix)
        assert [type(segment) for segment in layer.segments] == [form]
        assert_multiplies(layer, matrix, bound=bound)


def test_a_device_that_only_decodes_eight_bit_floats_leaves_inputs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = "services.worker.layers.triton_ops.fp8_tiles_of"
    monkeypatch.setattr(tiles, lambda architecture: type("Tiles", (), {"is_native": False}))
    layer, _, _ = layer_of(matrix := float8_of((160, 200), (128, 128), "float8"))
    assert [type(segment) for segment in layer.segments] == [W8Segment]
    assert_multiplies(layer, matrix)


def test_stacked_matrices_that_are_stored_alike_are_one_product() -> None:
    alike = [codes_of((rows, 64), 4, 16, 8) for rows in (32, 8, 16)]
    layer, _, _ = layer_of(*alike)
    assert [segment.num_outputs for segment in layer.segments] == [56]
    assert_multiplies(layer, *alike)
    mixed = [alike[0], codes_of((8, 64), 6, 16, 32), codes_of((16, 64), 6, 16, 32), normal(8, 64), codes_of((8, 64), 4, 32, 8)]
    layer, _, _ = layer_of(*mixed)
    assert [segment.num_outputs for segment in layer.segments] == [32, 24, 8, 8]
    assert [type(segment) for segment in layer.segments] == [W4Segment, W8Segment, PlainSegment, W4Segment]
    assert_multiplies(layer, *mixed)


def test_blocks_of_eight_bit_floats_are_joined_where_they_are_whole() -> None:
    whole = [float8_of((rows, 128), (128, 128), "float8") for rows in (128, 64, 128)]
    layer, _, _ = layer_of(*whole)
    assert [segment.num_outputs for segment in layer.segments] == [192, 128]
    assert_multiplies(layer, *whole, bound=0.05)


def test_a_bias_is_added_to_each_part() -> None:
    matrices = [codes_of((8, 32), 4, 16, 8), normal(4, 32), codes_of((8, 32), 8, 32, 128)]
    layer, _, _ = layer_of(*matrices)
    bias, x = normal(20), normal(2, 32)
    assert isinstance(layer, QuantizedLinear)
    assert_matches(QuantizedLinear(layer.segments, bias)(x), layer(x) + bias)


def test_groups_that_no_kernel_knows_are_unpacked_with_the_reason() -> None:
    for matrix, reason in (
        (codes_of((16, 64), 4, 8, 8), "it has groups of 8 inputs, and the kernels multiply groups of a multiple of 16 inputs"),
        (float8_of((16, 64), (16, 24)), "it has blocks of 24 inputs, and the kernels multiply groups of a multiple of 16 inputs"),
    ):
        layer, ops, loader = layer_of(matrix)
        assert isinstance(layer, Linear)
        assert loader.unpacked == {"part 0": reason}
        assert ops.num_bytes == 16 * 64 * 4
        assert_multiplies(layer, matrix)


def test_plain_matrices_are_torchs() -> None:
    layer, ops, _ = layer_of(normal(8, 32), normal(8, 32))
    assert isinstance(layer, Linear)
    assert ops.num_bytes == 16 * 32 * 4


def test_experts_are_plain_numbers_with_the_reason() -> None:
    stored = {"a": codes_of((8, 32), 4, 16, 8), "b": codes_of((8, 32), 4, 16, 8)}
    loader = Loader(stored, torch.float32)
    ops = TritonOps(loader, HostDevice())  # type: ignore[arg-type]
    experts = ops.experts([[("a", (8, 32))], [("b", (8, 32))]])
    assert torch.equal(experts.weight, torch.stack([numbers(matrix) for matrix in stored.values()]))
    assert loader.unpacked == dict.fromkeys(stored, "experts are multiplied as plain numbers")
    assert ops.num_bytes == 2 * 8 * 32 * 4


def test_words_are_those_of_the_kernels() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 24)).astype(np.uint8)
    assert np.array_equal(_words(codes), pack_words(torch.from_numpy(codes), GPTQ_ORDER).numpy())
