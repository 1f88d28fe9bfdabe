"""Blocks of GGUF's quantised types to the common form, each number as the file has it.

Small blocks hold 32 values under float16 scales. Super-blocks of 256 values hold one or two float16 factors and a small integer for
each group; a scale is their product, exact in float32. Where codes point into a table of int8 values, those values are given.

Source: block layouts of ggml (ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.worker.quantization.quantized_matrix import Floats, QuantizedMatrix

Bytes = npt.NDArray[np.uint8]

_SUPER_BLOCK: Final = 256
_CHUNK_BYTES: Final = 1 << 18
"""Blocks unpacked at a time, so that temporaries stay in the cache and their memory is used again."""

_IQ4_VALUES: Final = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int16)
"""What the 16 codes of IQ4_NL and IQ4_XS stand for, times the scale."""

_IQ4_CODES: Final = (_IQ4_VALUES + 128).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One type of blocks.

    Attributes:
        num_values: Values a block.
        num_bytes: Bytes a block.
        bits: As in `QuantizedMatrix`, with `group_size` and `zero`; a type without `zero` has minimums.
        scale_dtype: Type of scales and minimums.
        unpack: `[n, num_bytes]` bytes → codes `[n, num_values]`, scales and minimums `[n, num_values / group_size]`.
    """

    num_values: int
    num_bytes: int
    bits: int
    group_size: int
    zero: int | None
    scale_dtype: type[np.float16] | type[np.float32]
    unpack: Callable[[Bytes], tuple[Bytes, Floats, Floats | None]]


def unpack_blocks(rows: Bytes, dtype_name: str) -> QuantizedMatrix:
    """Give a tensor's blocks as a quantised matrix.

    Args:
        rows: `[num_rows, bytes_per_row]`, as `Weights.load_packed` gives them.
        dtype_name: A name of `BLOCK_LAYOUTS`.
    """
    layout = BLOCK_LAYOUTS[dtype_name]
    blocks = rows.reshape(-1, layout.num_bytes)
    num_groups = layout.num_values // layout.group_size
    codes = np.empty((len(blocks), layout.num_values), dtype=np.uint8)
    scales = np.empty((len(blocks), num_groups), dtype=layout.scale_dtype)
    minimums = np.empty_like(scales) if layout.zero is None else None
    step = max(1, _CHUNK_BYTES // layout.num_values)
    for first in range(0, len(blocks), step):
        chunk = slice(first, first + step)
        codes[chunk], scales[chunk], chunk_minimums = layout.unpack(blocks[chunk])
        if minimums is not None:
            minimums[chunk] = chunk_minimums
    num_rows = rows.shape[0]
    return QuantizedMatrix(
        codes=codes.reshape(num_rows, -1),
        bits=layout.bits,
        group_size=layout.group_size,
        scales=scales.reshape(num_rows, -1),
        zero=layout.zero,
        minimums=None if minimums is None else minimums.reshape(num_rows, -1),
    )


def _half(blocks: Bytes, first: int) -> npt.NDArray[np.float16]:
    """The float16 field at byte `first` of each block, `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2")


def _factor(blocks: Bytes, first: int) -> npt.NDArray[np.float32]:
    return _half(blocks, first).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """`[n, 16]` bytes to `[n, 32]` codes: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _bit_planes(packed: Bytes, *, run: int, bits: int) -> Bytes:
    """Fields of `bits` bits to codes: of each `run` bytes first all lowest fields, then the next ones, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _fifth_bits(blocks: Bytes, first: int) -> Bytes:
    """The high bits of 32 five-bit codes, as 0 or 16, from the four bytes at `first`."""
    return np.unpackbits(blocks[:, first : first + 4], axis=1, bitorder="little") << np.uint8(4)


def _unpack_q4_0(blocks: Bytes) -> tuple[Bytes, Floats, None]:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _unpack_q4_1(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _unpack_q5_0(blocks: Bytes) -> tuple[Bytes, Floats, None]:
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), _half(blocks, 0), None


def _unpack_q5_1(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _unpack_q8_0(blocks: Bytes) -> tuple[Bytes, Floats, None]:
    # Adding 128 turns the sign bit round.
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0), None


def _unpack_q2_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    pairs, packed = blocks[:, :16], blocks[:, 16:80]
    return _bit_planes(packed, run=32, bits=2), _factor(blocks, 80) * (pairs & 15), _factor(blocks, 82) * -(pairs >> 4).astype("f4")


def _unpack_q3_k(blocks: Bytes) -> tuple[Bytes, Floats, None]:
    high = _bit_planes(blocks[:, :32], run=32, bits=1) << np.uint8(2)
    low_scales = _bit_planes(blocks[:, 96:104], run=8, bits=4)
    high_scales = _bit_planes(blocks[:, 104:108], run=4, bits=2) << np.uint8(4)
    scales = (low_scales | high_scales).astype(np.float32) - 32.0
    return _bit_planes(blocks[:, 32:96], run=32, bits=2) | high, _factor(blocks, 108) * scales, None


def _scales_and_minimums(blocks: Bytes) -> tuple[Floats, Floats]:
    """Of Q4_K and Q5_K: eight six-bit scales and eight six-bit minimums in twelve bytes, under two factors."""
    packed = blocks[:, 4:16]
    scales, minimums, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    high_scales = (rest & 15) | (scales >> 6) << np.uint8(4)
    high_minimums = (rest >> 4) | (minimums >> 6) << np.uint8(4)
    all_scales = np.concatenate([scales & 63, high_scales], axis=1).astype(np.float32)
    all_minimums = np.concatenate([minimums & 63, high_minimums], axis=1).astype(np.float32)
    return _factor(blocks, 0) * all_scales, _factor(blocks, 2) * -all_minimums


def _unpack_q4_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    return _bit_planes(blocks[:, 16:], run=32, bits=4), *_scales_and_minimums(blocks)


def _unpack_q5_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    high = _bit_planes(blocks[:, 16:48], run=32, bits=1) << np.uint8(4)
    return _bit_planes(blocks[:, 48:], run=32, bits=4) | high, *_scales_and_minimums(blocks)


def _unpack_q6_k(blocks: Bytes) -> tuple[Bytes, Floats, None]:
    high = _bit_planes(blocks[:, 128:192], run=32, bits=2) << np.uint8(4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _bit_planes(blocks[:, :128], run=64, bits=4) | high, _factor(blocks, 208) * scales, None


def _unpack_iq4_nl(blocks: Bytes) -> tuple[Bytes, Floats, None]:
    return _IQ4_CODES[_nibbles(blocks[:, 2:])], _half(blocks, 0), None


def _unpack_iq4_xs(blocks: Bytes) -> tuple[Bytes, Floats, None]:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(len(blocks), 8)
    scales = (low | high << np.uint16(4)).astype(np.float32) - 32.0
    return _IQ4_CODES[_bit_planes(blocks[:, 8:], run=16, bits=4)], _factor(blocks, 0) * scales, None


def _small(
    num_bytes: int, bits: int, zero: int | None, unpack: Callable[[Bytes], tuple[Bytes, Floats, Floats | None]]
) -> BlockLayout:
    return BlockLayout(32, num_bytes, bits, 32, zero, np.float16, unpack)


def _super(
    num_bytes: int, bits: int, group_size: int, zero: int | None, unpack: Callable[[Bytes], tuple[Bytes, Floats, Floats | None]]
) -> BlockLayout:
    return BlockLayout(_SUPER_BLOCK, num_bytes, bits, group_size, zero, np.float32, unpack)


BLOCK_LAYOUTS: Final[Mapping[str, BlockLayout]] = {
    "q4_0": _small(18, 4, 8, _unpack_q4_0),
    "q4_1": _small(20, 4, None, _unpack_q4_1),
    "q5_0": _small(22, 5, 16, _unpack_q5_0),
    "q5_1": _small(24, 5, None, _unpack_q5_1),
    "q8_0": _small(34, 8, 128, _unpack_q8_0),
    "q2_k": _super(84, 4, 16, None, _unpack_q2_k),
    "q3_k": _super(110, 4, 16, 4, _unpack_q3_k),
    "q4_k": _super(144, 4, 32, None, _unpack_q4_k),
    "q5_k": _super(176, 5, 32, None, _unpack_q5_k),
    "q6_k": _super(210, 6, 16, 32, _unpack_q6_k),
    "iq4_nl": _small(18, 8, 128, _unpack_iq4_nl),
    "iq4_xs": _super(136, 8, 32, 128, _unpack_iq4_xs),
}
"""Types that can be given in the common form, by the name in `TensorInfo.dtype_name`."""
