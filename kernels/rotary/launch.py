"""Host side of rotary position embedding: checks, blocks, launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kernels.launching import FLOAT_TYPES, INDEX_TYPES, Arguments, Launch, LaunchConfig, next_power_of_2, planned
from kernels.rotary.kernel import rotary_kernel

CONFIG: Final = LaunchConfig(num_warps=4)

_TILE: Final = 512


@dataclass(frozen=True, slots=True)
class Blocks:
    """Heads and pairs of a program's tile."""

    num_heads: int
    num_pairs: int


def blocks_of(num_pairs: int) -> Blocks:
    """Choose the tile for heads of so many pairs: about 512 pairs a program, 4 a thread."""
    padded = next_power_of_2(num_pairs)
    return Blocks(num_heads=max(_TILE // padded, 1), num_pairs=padded)


def rotary(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_interleaved: bool,
) -> None:
    """Turn queries and keys by their positions, in place.

    Args:
        queries: `[num_tokens, num_heads, head_dim]`; tokens and heads may be strided.
        keys: `[num_tokens, num_kv_heads, head_dim]`, likewise.
        positions: int32 or int64 `[num_tokens]`; a token whose position is no row of the table is padding, and left as it is.
        cos: float32 `[num_positions, rotary_dim / 2]`, contiguous; scaling of any kind lies in it.
        sin: Likewise.
        is_interleaved: Neighbours pair, and not halves.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    _plan(queries, keys, positions, cos, sin, is_interleaved)(queries, keys, positions, cos, sin)


@planned
def _plan(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool
) -> Launch:
    """Check the arguments, and plan the launch on the tensors."""
    arguments = Arguments("rotary", queries.device)
    arguments.tensor("queries", queries, shape=(None, None, None), dtypes=FLOAT_TYPES)
    num_tokens, num_heads, head_dim = queries.shape
    arguments.tensor("keys", keys, shape=(num_tokens, None, head_dim), dtypes=(queries.dtype,))
    arguments.tensor("positions", positions, shape=(num_tokens,), dtypes=INDEX_TYPES)
    arguments.tensor("cos", cos, shape=(None, None), dtypes=(torch.float32,), is_contiguous=True)
    arguments.tensor("sin", sin, shape=cos.shape, dtypes=(torch.float32,), is_contiguous=True)
    num_positions, half = cos.shape
    arguments.require(1 <= half <= head_dim // 2, "cos", f"a table of 1 to {head_dim // 2} pairs", half)
    num_kv_heads = keys.shape[1]
    blocks = blocks_of(half)
    num_blocks = -(-num_heads // blocks.num_heads) + -(-num_kv_heads // blocks.num_heads)
    numbers = (num_positions, num_heads, num_kv_heads, *queries.stride()[:2], *keys.stride()[:2], cos.stride(0))
    constants = {"HALF": half, "IS_INTERLEAVED": is_interleaved, "HEADS": blocks.num_heads, "BLOCK": blocks.num_pairs}
    return Launch(rotary_kernel, (num_tokens, num_blocks), numbers, constants, CONFIG)
