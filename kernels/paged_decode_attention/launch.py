"""Host side of decode attention: checks, splits, blocks, launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kernels.architecture import Architecture, architecture_of
from kernels.attention_inputs import HeadShape, Scoring, check_tensors
from kernels.launching import INDEX_TYPES, Arguments, Launch, LaunchConfig, next_power_of_2, planned
from kernels.paged_decode_attention.kernel import paged_decode_attention_reduce_kernel, paged_decode_attention_split_kernel

MAX_SPLITS: Final = 32
"""Splits of a row at most; a power of 2."""

SPLIT_TOKENS_MIN: Final = 128
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
    if row_bytes == 256 and num_heads == 16:
        # Small programs, many to a unit: timed on an H100 with 1 to 64 rows of 276 to 8192 tokens.
        return Blocks(num_heads, shape.block_d, 32, LaunchConfig(num_warps=2, num_stages=num_stages))
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
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if out is None else out
    sinks = scoring.sinks
    plan = _plan(
        out, queries, layer_pages, page_tables, lengths, sinks, scoring.scale, scoring.soft_cap, scoring.window, max_length
    )
    partials = torch.empty(plan.partials_shape, dtype=torch.float32, device=queries.device)
    log_sums = torch.empty(plan.partials_shape[:3], dtype=torch.float32, device=queries.device)
    plan.split(out, partials, log_sums, queries, layer_pages, page_tables, lengths, sinks)
    if plan.reduce is not None:
        plan.reduce(out, partials, log_sums, lengths, sinks)
    return out


@dataclass(frozen=True, slots=True)
class _Plan:
    """Both passes.

    Attributes:
        split: Attends each row, or parts of it.
        reduce: Puts the parts of split rows together; None where none can be.
        partials_shape: Room for parts, float32 `[num_rows, num_heads, num_parts, block_d]`; they begin at multiples of 16 numbers.
    """

    split: Launch
    reduce: Launch | None
    partials_shape: tuple[int, int, int, int]


@planned
def _plan(  # noqa: PLR0913 (a tensor each)
    out: torch.Tensor,
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    page_tables: torch.Tensor,
    lengths: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    window: int,
    max_length: int,
) -> _Plan:
    """Check the arguments, and plan both launches."""
    arguments = Arguments("paged_decode_attention", queries.device)
    num_rows, scoring = queries.shape[0], Scoring(scale, window, soft_cap, sinks)
    shape = check_tensors(arguments, queries, layer_pages, page_tables, num_rows=num_rows, scoring=scoring)
    arguments.tensor("lengths", lengths, shape=(num_rows,), dtypes=INDEX_TYPES)
    room = page_tables.shape[1] * shape.page_size
    arguments.require(0 <= max_length <= room, "max_length", f"0 to {room} tokens, which the page tables hold", max_length)
    arguments.tensor("out", out, shape=queries.shape, dtypes=(queries.dtype,))
    num_splits = splits_of(max_length)
    blocks = blocks_of(architecture_of(queries.device), shape, queries.dtype)
    num_parts = num_splits if num_splits > 1 else 0
    partials_shape = (num_rows, shape.num_heads, num_parts, blocks.num_dims)
    # As torch lays them out: sizes of 0 count as 1.
    head = max(num_parts, 1)
    part_strides = (shape.num_heads * head * blocks.num_dims, head * blocks.num_dims, blocks.num_dims, shape.num_heads * head, head)
    numbers = (
        scale,
        soft_cap,
        window,
        *out.stride()[:2],
        *part_strides,
        *queries.stride()[:2],
        *layer_pages.stride()[:4],
        page_tables.stride(0),
    )
    common = {
        "HAS_WINDOW": window > 0,
        "HAS_SINKS": sinks is not None,
        "HEAD_DIM": shape.head_dim,
        "MAX_SPLITS": MAX_SPLITS,
        "SPLIT_TOKENS_MIN": SPLIT_TOKENS_MIN,
        "BLOCK_D": blocks.num_dims,
        "BLOCK_N": blocks.num_keys,
    }
    constants = common | {
        "HAS_SOFT_CAP": soft_cap > 0,
        "GROUP": shape.group,
        "PAGE_SIZE": shape.page_size,
        "BLOCK_G": blocks.num_heads,
    }
    grid = (num_rows, shape.num_kv_heads, num_splits)
    split = Launch(paged_decode_attention_split_kernel, grid, numbers, constants, blocks.config)
    if not num_parts:
        return _Plan(split, None, partials_shape)
    reduce_grid, reduce_numbers = (num_rows, shape.num_heads), (window, *out.stride()[:2], *part_strides)
    reduce = Launch(paged_decode_attention_reduce_kernel, reduce_grid, reduce_numbers, common, REDUCE_CONFIG)
    return _Plan(split, reduce, partials_shape)
