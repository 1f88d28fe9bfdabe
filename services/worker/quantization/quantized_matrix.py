"""The one form in which every block- or group-quantised weight matrix can be given, whatever file it came from.

A matrix is cut along its rows into groups of equal size; a group has a scale, and either all groups share one integer zero point or
each has a minimum of its own. Numbers are those of the file: nothing is quantised again and nothing is rounded but where
`dequantize` says so. Backends pack from this form; what the bytes of a file mean is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

BITS: Final = (4, 5, 6, 8)
"""Sizes of codes; what a file packs smaller still is given in the next larger one."""


def narrowed(values: Floats) -> Floats:
    """Give numbers as float16 where that loses nothing, else as float32."""
    if values.dtype == np.float16:
        return values
    wide = values.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    return narrow if np.array_equal(narrow.astype(np.float32), wide) else wide


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix `[num_rows, num_columns]` as codes, scales and offsets.

    A weight is `scale * (code - zero)` where `zero` is set, else `scale * code + minimum`.

    Attributes:
        codes: uint8 `[num_rows, num_columns]`, from 0 to `2**bits - 1`.
        bits: 4, 5, 6 or 8.
        group_size: Neighbouring columns that share a scale; divides `num_columns`, and is `num_columns` for one scale a row.
        scales: `[num_rows, num_columns / group_size]`, float16 where the file's own are, else float32. May be 0 or negative.
        zero: The code that stands for zero, one for the whole matrix; None where `minimums` are given.
        minimums: As `scales`, in a type of their own; None where `zero` is given.
        input_type: See `QuantizationScheme`.
    """

    codes: npt.NDArray[np.uint8]
    bits: int
    group_size: int
    scales: Floats
    zero: int | None = None
    minimums: Floats | None = None
    input_type: str = ""

    def __post_init__(self) -> None:
        num_rows, num_columns = self.codes.shape
        assert self.codes.dtype == np.uint8
        assert self.bits in BITS
        assert num_columns % self.group_size == 0
        assert (self.zero is None) != (self.minimums is None)
        for values in (self.scales, self.minimums):
            assert values is None or values.shape == (num_rows, num_columns // self.group_size)
            assert values is None or values.dtype in (np.float16, np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """`(num_rows, num_columns)`."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        """Size of all arrays, in bytes."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minimums is None else self.minimums.nbytes)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Give the weights in float32; the reference that every packed form is tested against.

        `scale * (code - zero)` is exact in float32 for every format that is read, but where the file's scales are float32
        themselves. `scale * code + minimum` is rounded once, by the sum: both of its terms are exact likewise.
        """
        num_rows, num_columns = self.shape
        values = self.codes.reshape(num_rows, -1, self.group_size).astype(np.float32)
        if self.zero is not None:
            values -= np.float32(self.zero)
        values *= self.scales.astype(np.float32)[:, :, None]
        if self.minimums is not None:
            values += self.minimums.astype(np.float32)[:, :, None]
        return values.reshape(num_rows, num_columns)

    def split_groups(self, group_size: int) -> QuantizedMatrix:
        """Give the same matrix in smaller groups, each with the scale of the larger one that it is a part of.

        Args:
            group_size: Divides the present one.
        """
        assert self.group_size % group_size == 0
        repeats = self.group_size // group_size
        return QuantizedMatrix(
            codes=self.codes,
            bits=self.bits,
            group_size=group_size,
            scales=np.repeat(self.scales, repeats, axis=1),
            zero=self.zero,
            minimums=None if self.minimums is None else np.repeat(self.minimums, repeats, axis=1),
            input_type=self.input_type,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Float8Matrix:
    """A matrix `[num_rows, num_columns]` of e4m3fn numbers, each times the scale of its block.

    Attributes:
        codes: uint8 `[num_rows, num_columns]`: the numbers, bit by bit.
        scales: float32 `[num_rows / block_rows, num_columns / block_columns]`, rounded up.
        block_rows: Rows of a block; 1 where each row has a scale of its own.
        block_columns: Columns of a block; `num_columns` for one scale a row. The last blocks may be short.
        input_type: See `QuantizationScheme`.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    block_rows: int
    block_columns: int
    input_type: str = ""

    def __post_init__(self) -> None:
        num_rows, num_columns = self.codes.shape
        assert self.scales.shape == (-(-num_rows // self.block_rows), -(-num_columns // self.block_columns))

    @property
    def num_bytes(self) -> int:
        """Size of all arrays, in bytes."""
        return self.codes.nbytes + self.scales.nbytes
