"""Block-quantised weights to floating point, straight into their place in a larger tensor.

Written in torch operations, so that it is vectorised, uses the compute threads and lets go of the interpreter; values are computed
in float32 and rounded once, on the way into `out`, which gives the same bits as unpacking to float32 and converting afterwards.
The types here are those that small models are mostly published in; every other type goes through `Weights.load`.

Source: block layouts of ggml (ggml-common.h): 32 values a block, float16 scale first, low nibbles are the first 16 values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

BLOCK_SIZE: Final = 32
_CHUNK_BLOCKS: Final = 4096
"""Blocks unpacked at a time: half a MiB of float32, so that temporaries stay in the cache and their memory is used again."""


def dequantize_into(rows: npt.NDArray[np.uint8], dtype_name: str, out: torch.Tensor) -> None:
    """Unpack a whole tensor.

    Args:
        rows: `[num_rows, bytes_per_row]`, as `Weights.load_packed` gives them.
        dtype_name: A name of `BLOCK_TYPES`.
        out: Contiguous, floating-point, as many values as the rows hold.
    """
    num_bytes, unpack = BLOCK_TYPES[dtype_name]
    blocks = torch.from_numpy(rows).view(-1, num_bytes)
    places = out.view(-1, BLOCK_SIZE)
    for first in range(0, blocks.shape[0], _CHUNK_BLOCKS):
        chunk = slice(first, first + _CHUNK_BLOCKS)
        places[chunk].copy_(unpack(blocks[chunk]))


def _halves(blocks: torch.Tensor, num: int) -> torch.Tensor:
    """The float16 fields at the start of each block, `[num_blocks, num]` in float32."""
    return blocks[:, : 2 * num].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """`[num_blocks, 16]` bytes to `[num_blocks, 32]` float32 values from 0 to 15."""
    values = torch.empty((packed.shape[0], BLOCK_SIZE), dtype=torch.float32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values


def _unpack_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8.0).mul_(_halves(blocks, 1))


def _unpack_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    scale_and_min = _halves(blocks, 2)
    return _nibbles(blocks[:, 4:]).mul_(scale_and_min[:, :1]).add_(scale_and_min[:, 1:])


def _unpack_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 1))


BLOCK_TYPES: Final[Mapping[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]]] = {
    "q4_0": (18, _unpack_q4_0),
    "q4_1": (20, _unpack_q4_1),
    "q8_0": (34, _unpack_q8_0),
}
"""Types unpacked here, by the name in `TensorInfo.dtype_name`: bytes a block, and blocks → float32 `[num_blocks, 32]`."""
