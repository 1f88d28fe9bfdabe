"""Weights into the layout of the native kernels, a run of rows at a time, so that at no time a matrix is there twice.

A packed matrix is panels of `PANEL_ROWS` outputs, one after the other; a run of whole panels is packed by itself and put in its
place. Quantised weights keep the file's own codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from kernels.cpu import library as native
from services.worker.quantization.quantized_matrix import QuantizedMatrix
from services.worker.weights import WeightLoader

_GROUP_SIZES: Final = "16, or a multiple of 32 in rows of a multiple of 32"


class UnsupportedError(Exception):
    """The native kernels cannot compute this model; the text says what it is."""


def pack_matrix(library: Any, weights: WeightLoader, name: str, shape: tuple[int, int]) -> native.PackedMatrix:
    """Take one matrix and pack it.

    Args:
        library: From `native.load_library`.
        weights: Where the matrix comes from.
        name: The matrix.
        shape: `(out_features, in_features)`.

    Raises:
        UnsupportedError: Its groups are none that the kernels know.
        ModelError: See `WeightLoader.take`.
    """
    blocks = weights.take_blocks(name, shape, multiple=native.PANEL_ROWS)
    if blocks is not None:
        dtype_name, rows = blocks
        return _joined(library, (native.pack_blocks(library, dtype_name, run, shape[1]) for run in rows), shape)
    matrices = weights.take_quantized(name, shape, multiple=native.PANEL_ROWS)
    if matrices is not None:
        return _joined(library, (_pack_codes(library, name, matrix) for matrix in matrices), shape)
    tensors = weights.take_rows(name, shape, multiple=native.PANEL_ROWS)
    return _joined(library, (_pack_numbers(library, tensor) for tensor in tensors), shape)


def _pack_numbers(library: Any, tensor: torch.Tensor) -> native.PackedMatrix:
    is_bf16 = tensor.dtype is torch.bfloat16
    return native.pack_dense(library, (tensor.view(torch.int16) if is_bf16 else tensor.float()).numpy())


def _pack_codes(library: Any, name: str, matrix: QuantizedMatrix) -> native.PackedMatrix:
    num_columns = matrix.shape[1]
    if num_columns % 32 or not (matrix.group_size == 16 or matrix.group_size % 32 == 0):
        raise UnsupportedError(f"{name}: groups of {matrix.group_size} weights in rows of {num_columns}, not {_GROUP_SIZES}")
    scales, minimums = matrix.scales, matrix.minimums
    if minimums is not None and minimums.dtype != scales.dtype:
        scales, minimums = scales.astype(np.float32), minimums.astype(np.float32)
    return native.pack_codes(library, matrix.codes, bits=matrix.bits, scales=scales, zero=matrix.zero or 0, minimums=minimums)


def _joined(library: Any, runs: Iterator[native.PackedMatrix], shape: tuple[int, int]) -> native.PackedMatrix:
    """Runs of whole panels, in order, as one matrix; the last one may end inside a panel."""
    first = next(runs)
    if first.out_features == shape[0]:
        return first
    segment = native.Segment.from_buffer_copy(first.segments[0])
    segment.n = shape[0]
    panel_bytes = library.hr_unit_bytes(segment)
    data = native.aligned_zeros(native.padded(shape[0], native.PANEL_ROWS) // native.PANEL_ROWS * panel_bytes, np.uint8)
    segment.data = data.ctypes.data
    at = _put(data, first, 0)
    for run in runs:
        at = _put(data, run, at)
    assert at == len(data)
    return native.PackedMatrix((segment,), shape[0], shape[1], (data,))


def _put(data: np.ndarray[Any, np.dtype[np.uint8]], run: native.PackedMatrix, at: int) -> int:
    (packed,) = run.arrays
    data[at : at + len(packed)] = packed
    return at + len(packed)
