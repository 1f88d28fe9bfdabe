"""Quantised matrices of safetensors checkpoints: AWQ, GPTQ, compressed-tensors and eight-bit floats.

Integer codes come in the common form, but where the inputs of a matrix are spread over its groups in no order (GPTQ's act-order):
such a matrix has no groups of neighbours and is given as plain numbers. So are eight-bit floats, unless a backend asks for their
bits (`read_float8`). Which tensors make a matrix, and
that they fit together, has been found before: see `headrace/models/quantized_layout.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from headrace.errors import ModelError
from headrace.models.quantized_layout import StoredMatrix, is_in_order
from headrace.models.weights import Weights
from services.worker.quantization.quantized_matrix import Float8Matrix, Floats, QuantizedMatrix, narrowed
from services.worker.row_runs import row_runs

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.integer[Any]]

_WORD_BITS: Final = 32
_WORD_CODES_MAX: Final = 8
"""Codes a word, at most: those of 4 bits."""

_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the codes of eight neighbouring columns are."""

FP8_DTYPES: Final = {"f8_e4m3": torch.float8_e4m3fn, "f8_e5m2": torch.float8_e5m2}
"""Eight-bit floats by the name in `TensorInfo.dtype_name`."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the stored tensors of a matrix of integer codes say.

    Attributes:
        codes: Reads those of a run of rows, `[num_rows, num_columns]`, unsigned. A run begins at a multiple of a word's codes.
        scales: `[num_rows, num_groups]`.
        zeros: The codes of zero, `[num_rows, num_groups]` or one for all.
    """

    codes: Callable[[slice], Bytes]
    scales: Floats
    zeros: Integers | int


def read_quantized(weights: Weights, stored: StoredMatrix, *, multiple: int) -> Iterator[QuantizedMatrix] | None:
    """Give a matrix in the common form, a run of rows at a time; None for one that has to be read as plain numbers.

    Args:
        weights: Where its parts are.
        stored: The matrix.
        multiple: Each run but the last has a multiple of so many rows; itself a multiple of `_WORD_CODES_MAX`.

    Raises:
        ModelError: Its parts hold what cannot be.
    """
    if stored.layout == "fp8" or _order(weights, stored) is not None:
        return None
    parts = _read_parts(weights, stored)
    zero, minimums = _offsets(parts.scales, parts.zeros)
    return (
        QuantizedMatrix(
            codes=parts.codes(rows),
            bits=stored.bits,
            group_size=stored.shape[1] // parts.scales.shape[1],
            scales=parts.scales[rows],
            zero=zero,
            minimums=None if minimums is None else minimums[rows],
            input_type=stored.scheme.input_type,
        )
        for rows in row_runs(*stored.shape, multiple=multiple)
    )


def read_float8(weights: Weights, stored: StoredMatrix, *, multiple: int) -> Iterator[Float8Matrix] | None:
    """Give a matrix of eight-bit floats as its bits, a run of rows at a time; None where they are e5m2.

    Args:
        weights: Where its parts are.
        stored: The matrix.
        multiple: Each run but the last has a multiple of so many rows.
    """
    if stored.dtype_name != "f8_e4m3":
        return None
    num_rows, num_columns = stored.shape
    scales, block = _float8_scales(weights, stored)
    block_rows, block_columns = block or (1, num_columns)
    if block is None:
        scales = np.broadcast_to(scales.reshape(-1, 1), (num_rows, 1))
    return (
        Float8Matrix(
            codes=weights.load_packed(stored.parts["codes"], rows),
            scales=np.ascontiguousarray(scales[rows.start // block_rows : -(-rows.stop // block_rows)]),
            block_rows=block_rows,
            block_columns=block_columns,
            input_type=stored.scheme.input_type,
        )
        for rows in row_runs(num_rows, num_columns, multiple=math.lcm(multiple, block_rows))
    )


def _float8_scales(weights: Weights, stored: StoredMatrix) -> tuple[npt.NDArray[np.float32], tuple[int, int] | None]:
    """Scales of eight-bit floats, and the shape of their blocks; without blocks there is one for all, or one a row."""
    scales = _floats(weights, stored.parts["scales"]).astype(np.float32)
    num_rows, block = stored.shape[0], stored.scheme.block_shape
    is_by_block = block is not None and scales.size > 1 and scales.shape not in ((num_rows,), (num_rows, 1))
    return scales, block if is_by_block else None


def read_into(weights: Weights, stored: StoredMatrix, place: torch.Tensor) -> None:
    """Read a matrix as numbers into its place: computed in float32, rounded once.

    Args:
        weights: Where its parts are.
        stored: The matrix.
        place: `[num_rows, num_columns]`, floating-point.

    Raises:
        ModelError: Its parts hold what cannot be.
    """
    if stored.layout == "fp8":
        _read_fp8_into(weights, stored, place)
        return
    order = _order(weights, stored)
    parts = _read_parts(weights, stored)
    num_rows, num_columns = stored.shape
    if order is None:
        order = np.arange(num_columns) // (num_columns // parts.scales.shape[1])
    scales, zeros = parts.scales.astype(np.float32), np.broadcast_to(np.float32(parts.zeros), parts.scales.shape)
    for rows in row_runs(num_rows, num_columns, multiple=_WORD_CODES_MAX):
        values = parts.codes(rows).astype(np.float32)
        values -= zeros[rows][:, order]
        values *= scales[rows][:, order]
        place[rows].copy_(torch.from_numpy(values))


def _read_fp8_into(weights: Weights, stored: StoredMatrix, place: torch.Tensor) -> None:
    num_rows, num_columns = stored.shape
    found, block = _float8_scales(weights, stored)
    scales = torch.from_numpy(found)
    for rows in row_runs(num_rows, num_columns):
        if block is not None:
            of_rows = scales[torch.arange(rows.start, min(rows.stop, num_rows)) // block[0]]
            factors = of_rows.repeat_interleave(block[1], dim=1)[:, :num_columns]
        else:
            factors = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(num_rows, 1)[rows]
        bits = torch.from_numpy(weights.load_packed(stored.parts["codes"], rows)).view(FP8_DTYPES[stored.dtype_name])
        place[rows].copy_(bits.float().mul_(factors))


def _read_parts(weights: Weights, stored: StoredMatrix) -> _Parts:
    return {"awq": _read_awq, "gptq": _read_gptq, "packed": _read_packed, "int8": _read_int8}[stored.layout](weights, stored)


def _read_awq(weights: Weights, stored: StoredMatrix) -> _Parts:
    words = weights.load(stored.parts["codes"])
    per_word = _WORD_BITS // stored.bits

    def codes(rows: slice) -> Bytes:
        columns = slice(rows.start // per_word, -(-rows.stop // per_word))
        return np.ascontiguousarray(_awq_fields(words[:, columns], stored.bits).T[: rows.stop - rows.start])

    zeros = _awq_fields(weights.load(stored.parts["zeros"]), stored.bits)
    return _Parts(codes, _by_rows(_floats(weights, stored.parts["scales"]).T), zeros.T)


def _awq_fields(words: Integers, bits: int) -> Bytes:
    return _fields(words, bits)[:, :, _AWQ_PLACES].reshape(len(words), -1)


def _read_gptq(weights: Weights, stored: StoredMatrix) -> _Parts:
    words = weights.load(stored.parts["codes"])

    def codes(rows: slice) -> Bytes:
        fields = _fields(words[:, rows], stored.bits)
        return fields.transpose(1, 0, 2).reshape(rows.stop - rows.start, -1)

    fields = _fields(weights.load(stored.parts["zeros"]), stored.bits)
    # A zero point of 0 was stored as the largest code in the first format.
    zeros = fields.reshape(len(fields), -1) + np.uint8(stored.scheme.zero_offset) & np.uint8((1 << stored.bits) - 1)
    return _Parts(codes, _by_rows(_floats(weights, stored.parts["scales"]).T), zeros.T)


def _read_packed(weights: Weights, stored: StoredMatrix) -> _Parts:
    num_rows, num_columns = stored.shape

    def codes(rows: slice) -> Bytes:
        words = weights.load_packed(stored.parts["codes"], rows).view("<i4")
        return np.ascontiguousarray(_fields(words, stored.bits).reshape(len(words), -1)[:, :num_columns])

    half = 1 << (stored.bits - 1)
    zeros: Integers | int = half
    if "zeros" in stored.parts:
        packed = weights.load(stored.parts["zeros"])
        if packed.dtype == np.int8:
            zeros = packed.astype(np.int32) + half
        else:
            zeros = _fields(packed, stored.bits).transpose(0, 2, 1).reshape(-1, packed.shape[1])[:num_rows]
    return _Parts(codes, _group_scales(weights, stored), zeros)


def _read_int8(weights: Weights, stored: StoredMatrix) -> _Parts:
    def codes(rows: slice) -> Bytes:
        read = weights.load_packed(stored.parts["codes"], rows)
        # Adding 128 turns the sign bit round.
        read ^= np.uint8(128)
        return read

    scales = _group_scales(weights, stored)
    zeros: Integers | int = 128
    if "zeros" in stored.parts:
        signed = weights.load(stored.parts["zeros"]).astype(np.int32)
        zeros = np.broadcast_to(signed.reshape(-1, 1) if signed.ndim < 2 else signed, scales.shape) + 128
    return _Parts(codes, scales, zeros)


def _order(weights: Weights, stored: StoredMatrix) -> Integers | None:
    """Each input's group, where inputs are not in the order of their groups."""
    if "order" not in stored.parts:
        return None
    groups: Integers = weights.load(stored.parts["order"])
    scales = weights.stored_info(stored.parts["scales"]).shape
    num_groups = scales[0] if stored.layout == "gptq" else scales[-1]
    # -1 everywhere is how compressed-tensors says that there is no order.
    if (groups == -1).all() or is_in_order(groups, num_groups):
        return None
    if groups.min() < 0 or groups.max() >= num_groups:
        raise ModelError(
            f"tensor {stored.parts['order']} names group {max(groups.max(), -groups.min())}, but there are {num_groups}; "
            "pull the model again",
            param=stored.parts["order"],
        )
    return groups


def _offsets(scales: Floats, zeros: Integers | int) -> tuple[int | None, Floats | None]:
    """Zero points as `QuantizedMatrix` has them: one for all where they are alike, else minimums."""
    if isinstance(zeros, int):
        return zeros, None
    first = int(zeros.flat[0])
    if (zeros == first).all():
        return first, None
    return None, narrowed(scales.astype(np.float32) * -zeros.astype(np.float32))


def _group_scales(weights: Weights, stored: StoredMatrix) -> Floats:
    """Scales of compressed-tensors, `[num_rows, num_groups]`: one for all is repeated for each row."""
    scales = _floats(weights, stored.parts["scales"])
    if scales.size == 1:
        return np.full((stored.shape[0], 1), scales.flat[0])
    return scales.reshape(stored.shape[0], -1)


def _floats(weights: Weights, name: str) -> Floats:
    """Read a floating-point tensor, as float16 where that is exact."""
    values = weights.load(name)
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return narrowed(values)


def _by_rows(values: Floats) -> Floats:
    return np.ascontiguousarray(values)


def _fields(words: Integers, bits: int) -> Bytes:
    """`[n, m]` words of 32 bits to `[n, m, 32 / bits]` codes, lowest bits first."""
    shifts = np.arange(0, _WORD_BITS, bits, dtype=np.uint32)
    return (words.view(np.uint32)[:, :, None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)
