"""Quantised weights into the layouts of `kernels/quantized_matmul`, a run of rows at a time; numbers stay the file's own.

Codes of 4 bits are packed eight to a word (W4A16), all others take a byte each (W8A16), and inputs stay as they are. They are
quantised as well only where the checkpoint was made for that and the device multiplies such numbers: int8 with a scale a row
(W8A8), and e4m3fn in blocks of 128 x 128. Which of these a matrix becomes is seen from its first run of rows: all are stored alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kernels.quantized_matmul.launch import BLOCK_K_MIN, INT8_INPUTS_MAX, block_k_max_of
from kernels.quantized_matmul.reference import FP8_BLOCK, GPTQ_ORDER, PER_WORD, pack_words
from services.worker.layers.triton_linear import Float8Segment, Int8Segment, PlainSegment, Segment, W4Segment, W8Segment
from services.worker.quantization.quantized_matrix import Float8Matrix, Floats, QuantizedMatrix
from services.worker.weights import WeightLoader

_INT8_ZERO: Final = 128
_W4_ZERO: Final = 8
"""The zero point of kernels that are given none."""

_LAYOUTS: Final = f"the kernels multiply groups of a multiple of {BLOCK_K_MIN} inputs"

_Run = TypeVar("_Run", QuantizedMatrix, Float8Matrix)


def take_segment(weights: WeightLoader, name: str, shape: tuple[int, int], *, multiplies_float8: bool) -> Segment:
    """Take one matrix: as codes where a kernel knows them, else as numbers, with the reason in `WeightLoader.unpacked`.

    Args:
        weights: Where it comes from.
        name: The matrix.
        shape: `(out_features, in_features)`.
        multiplies_float8: Whether the device multiplies e4m3fn itself.

    Raises:
        ModelError: See `WeightLoader.take`.
    """
    matrices = weights.take_quantized(name, shape, multiple=PER_WORD)
    if matrices is not None:
        first, runs = _with_first(matrices)
        if block_k_max_of(first.group_size, shape[1]):
            return _pack_codes(first, runs, shape)
        weights.unpacked[name] = f"it has groups of {first.group_size} inputs, and {_LAYOUTS}"
        return _unpack((torch.from_numpy(run.dequantize()) for run in runs), shape, weights.dtype)
    floats = weights.take_float8(name, shape, multiple=PER_WORD)
    if floats is not None:
        first_floats, float_runs = _with_first(floats)
        if block_k_max_of(first_floats.block_columns, shape[1]):
            return _pack_float8(first_floats, float_runs, shape, multiplies_float8=multiplies_float8)
        weights.unpacked[name] = f"it has blocks of {first_floats.block_columns} inputs, and {_LAYOUTS}"
        return _unpack(map(_numbers, float_runs), shape, weights.dtype)
    return PlainSegment(weights.take(name, shape))


def _pack_codes(first: QuantizedMatrix, runs: Iterable[QuantizedMatrix], shape: tuple[int, int]) -> Segment:
    num_rows, num_columns = shape
    is_words = first.bits == 4 and num_rows % PER_WORD == 0 and num_columns % PER_WORD == 0
    codes: npt.NDArray[Any] = np.empty((num_columns // PER_WORD, num_rows), np.int32) if is_words else np.empty(shape, np.uint8)
    all_scales, all_minimums, first_row = [], [], 0
    for run in runs:
        rows = slice(first_row, first_row + run.shape[0])
        if is_words:
            codes[:, rows] = _words(run.codes).T
        else:
            codes[rows] = run.codes
        all_scales.append(run.scales)
        if run.minimums is not None:
            all_minimums.append(run.minimums)
        first_row = rows.stop
    scales, zero = np.concatenate(all_scales), first.zero
    minimums = np.concatenate(all_minimums) if all_minimums else None
    if zero is not None and not 0 <= zero < 1 << (4 if is_words else 8):
        minimums, zero = scales.astype(np.float32) * np.float32(-zero), None
    if _is_for_int8_inputs(first, num_columns):
        codes ^= np.uint8(_INT8_ZERO)
        return Int8Segment(torch.from_numpy(codes.view(np.int8)), torch.from_numpy(scales[:, 0].astype(np.float32)))
    if not is_words:
        return W8Segment(torch.from_numpy(codes), _by_groups(scales), first.group_size, zero or 0, _by_groups(minimums), False)
    zeros = np.full(scales.shape, zero) if minimums is None else _zero_points(scales, minimums)
    if zeros is not None:
        minimums = None
    qzeros = None if zeros is None or zero == _W4_ZERO else pack_words(torch.from_numpy(zeros.T), GPTQ_ORDER)
    return W4Segment(torch.from_numpy(codes), _by_groups(scales), first.group_size, qzeros, _by_groups(minimums))


def _pack_float8(
    first: Float8Matrix, runs: Iterable[Float8Matrix], shape: tuple[int, int], *, multiplies_float8: bool
) -> W8Segment | Float8Segment:
    codes, all_scales, first_row = np.empty(shape, np.uint8), [], 0
    for run in runs:
        rows = slice(first_row, first_row + len(run.codes))
        codes[rows] = run.codes
        all_scales.append(run.scales)
        first_row = rows.stop
    scales = np.concatenate(all_scales)
    is_for_float8_inputs = first.input_type == "float8" and first.block_rows == first.block_columns == FP8_BLOCK
    if is_for_float8_inputs and multiplies_float8:
        return Float8Segment(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales))
    by_row = np.repeat(scales, first.block_rows, axis=0)[: shape[0]]
    return W8Segment(torch.from_numpy(codes), _by_groups(by_row), first.block_columns, 0, None, True)


def _is_for_int8_inputs(first: QuantizedMatrix, num_columns: int) -> bool:
    is_by_row = first.group_size == num_columns <= INT8_INPUTS_MAX
    return first.input_type == "int8" and is_by_row and first.bits == 8 and first.zero == _INT8_ZERO


def _words(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Pack codes of 4 bits, `[num_rows, 8 n]`, into words `[num_rows, n]`, lowest bits first: pairs, fours, eights."""
    eight = np.ascontiguousarray(codes).view("<u8")
    eight = (eight | eight >> np.uint64(4)) & np.uint64(0x00FF00FF00FF00FF)
    eight = (eight | eight >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
    words: npt.NDArray[np.int32] = (eight | eight >> np.uint64(16)).astype(np.uint32).view(np.int32)
    return words


def _zero_points(scales: Floats, minimums: Floats) -> npt.NDArray[np.int64] | None:
    """Zero points of 4 bits that say what minimums say, `scale * -zero`, exactly; None where there are none."""
    wide, low = scales.astype(np.float32), minimums.astype(np.float32)
    zeros = np.rint(np.divide(-low, wide, out=np.zeros_like(low), where=wide != 0))
    is_exact = (zeros >= 0) & (zeros < 1 << 4) & (wide * -zeros == low)
    return zeros.astype(np.int64) if is_exact.all() else None


def _by_groups(values: Any) -> Any:
    """`[num_rows, num_groups]` as the kernels have it, `[num_groups, num_rows]`; None stays None."""
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values.T))


def _numbers(run: Float8Matrix) -> torch.Tensor:
    scales = np.repeat(np.repeat(run.scales, run.block_rows, axis=0), run.block_columns, axis=1)
    num_rows, num_columns = run.codes.shape
    return torch.from_numpy(run.codes).view(torch.float8_e4m3fn).float() * torch.from_numpy(scales[:num_rows, :num_columns])


def _unpack(runs: Iterable[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> PlainSegment:
    place, first_row = torch.empty(shape, dtype=dtype), 0
    for run in runs:
        place[first_row : first_row + len(run)] = run
        first_row += len(run)
    return PlainSegment(place)


def _with_first(runs: Iterator[_Run]) -> tuple[_Run, Iterator[_Run]]:
    """Look at the first run; gives it, and all runs."""
    first = next(runs)
    return first, chain((first,), runs)
