"""Host side of decode attention: checks, splits, blocks, launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kernels.architecture import Architecture, architecture_of
from kernels.attention_inputs import HeadShape, Scoring, check_tensors
from kernels.launching import INDEX_TYPES, Arguments, LaunchConfig, next_power_of_2
from kernels.paged_decode_attention.kernel import paged_decode_attention_reduce_kernel, paged_decode_attention_split_kernel

MAX_SPLITS: Final = 32
"""Splits of a row at most; a power of 2."""

SPLIT_TOKENS_MIN: Final = 256
"""Tokens of a split at least; a multiple of every block of keys."""

REDUCE_CONFIG: Final = LaunchConfig(num_warps=4)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tiles of the first pass: query heads, head size, keys."""

    num_heads: int
    num_dims: int
    num_keys: int
    config: LaunchConfig


def blocks_of(architecture: Architecture, shape: HeadShape, dtype: torch.dtype) -> Blocks:
    """Choose tiles such that keys and values of every stage fit into shared memory, and nothing is spilled."""
    num_heads = max(next_power_of_2(shape.group), 16)
    row_bytes = shape.block_d * dtype.itemsize
    if dtype is torch.float32:
        # No matrix unit multiplies float32 without loss; products fall to the vector units and their registers.
        return Blocks(num_heads, shape.block_d, 16, LaunchConfig(num_warps=8, num_stages=1))
    num_keys = 64 if row_bytes <= 256 and num_heads <= 64 else 32
    if architecture.backend == "hip":
        return Blocks(num_heads, shape.block_d, num_keys, LaunchConfig(num_warps=4, num_stages=1))
    num_stages = 3 if row_bytes <= 256 else 2
    return Blocks(num_heads, shape.block_d, num_keys, LaunchConfig(num_warps=4, num_stages=num_stages))


def splits_of(max_length: int) -> int:
    """How many splits a row of up to `max_length` tokens can fall into: the grid's third dimension."""
    return min(MAX_SPLITS, -(-max_length // SPLIT_TOKENS_MIN)) if max_length > 0 else 1


def paged_decode_attention(
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    page_tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scoring: Scoring,
    max_length: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each row's one query over its context.

    Args:
        queries: `[num_rows, num_heads, head_dim]`; rows and heads may be strided.
        layer_pages: `[num_pages, page_size, 2, num_kv_heads, head_dim]`.
        page_tables: int32 or int64 `[num_rows, width]`; entries past a row's context are not read.
        lengths: int32 or int64 `[num_rows]`, tokens of context, the new one included; 0 is a padded row, which gives 0.
        scoring: How scores are made.
        max_length: No length is larger; it decides the grid. For a captured graph, the largest it will ever replay.
        out: Where to, like `queries`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride, device or value is wrong.
    """
    arguments = Arguments("paged_decode_attention", queries.device)
    num_rows = queries.shape[0]
    shape = check_tensors(arguments, queries, layer_pages, page_tables, num_rows=num_rows, scoring=scoring)
    arguments.tensor("lengths", lengths, shape=(num_rows,), dtypes=INDEX_TYPES)
    room = page_tables.shape[1] * shape.page_size
    arguments.require(0 <= max_length <= room, "max_length", f"0 to {room} tokens, which the page tables hold", max_length)
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if out is None else out
    arguments.tensor("out", out, shape=queries.shape, dtypes=(queries.dtype,))
    if num_rows == 0:
        return out
    num_splits = splits_of(max_length)
    blocks = blocks_of(architecture_of(queries.device), shape, queries.dtype)
    partials, log_sums = _workspace(queries, num_splits, blocks.num_dims)
    paged_decode_attention_split_kernel[(num_rows, shape.num_kv_heads, num_splits)](
        out,
        partials,
        log_sums,
        queries,
        layer_pages,
        page_tables,
        lengths,
        scoring.sinks,
        scoring.scale,
        scoring.soft_cap,
        scoring.window,
        *out.stride()[:2],
        *partials.stride()[:3],
        *log_sums.stride()[:2],
        *queries.stride()[:2],
        *layer_pages.stride()[:4],
        page_tables.stride(0),
        HAS_SOFT_CAP=scoring.soft_cap > 0,
        HAS_WINDOW=scoring.window > 0,
        HAS_SINKS=scoring.sinks is not None,
        GROUP=shape.group,
        HEAD_DIM=shape.head_dim,
        PAGE_SIZE=shape.page_size,
        MAX_SPLITS=MAX_SPLITS,
        SPLIT_TOKENS_MIN=SPLIT_TOKENS_MIN,
        BLOCK_G=blocks.num_heads,
        BLOCK_D=blocks.num_dims,
        BLOCK_N=blocks.num_keys,
        **blocks.config.options(),
    )
    if num_splits > 1:
        _reduce(lengths, out, partials, log_sums, blocks, scoring)
    return out


def _workspace(queries: torch.Tensor, num_splits: int, block_d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of rows that are split, float32; none where none can be. Parts begin at multiples of 16 numbers."""
    num_rows, num_heads, _ = queries.shape
    num_parts = num_splits if num_splits > 1 else 0
    partials = torch.empty((num_rows, num_heads, num_parts, block_d), dtype=torch.float32, device=queries.device)
    log_sums = torch.empty((num_rows, num_heads, num_parts), dtype=torch.float32, device=queries.device)
    return partials, log_sums


def _reduce(
    lengths: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    log_sums: torch.Tensor,
    blocks: Blocks,
    scoring: Scoring,
) -> None:
    """Put the parts of split rows together."""
    num_rows, num_heads, head_dim = out.shape
    paged_decode_attention_reduce_kernel[(num_rows, num_heads)](
        out,
        partials,
        log_sums,
        lengths,
        scoring.sinks,
        scoring.window,
        *out.stride()[:2],
        *partials.stride()[:3],
        *log_sums.stride()[:2],
        HAS_WINDOW=scoring.window > 0,
        HAS_SINKS=scoring.sinks is not None,
        HEAD_DIM=head_dim,
        MAX_SPLITS=MAX_SPLITS,
        SPLIT_TOKENS_MIN=SPLIT_TOKENS_MIN,
        BLOCK_D=blocks.num_dims,
        BLOCK_N=blocks.num_keys,
        **REDUCE_CONFIG.options(),
    )
