"""Host side of extend attention: checks, blocks, launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kernels.architecture import Architecture, architecture_of
from kernels.attention_inputs import HeadShape, Scoring, TreeMask, check_tensors
from kernels.extend_attention.kernel import extend_attention_kernel
from kernels.launching import INDEX_TYPES, Arguments, Launch, LaunchConfig, next_power_of_2, planned

MASKED_TOKENS_MAX: Final = 32768
"""New tokens of a row with a mask: offsets into a row's mask are 32 bits."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The tile: new tokens, lines (a token and a head each), head size, keys."""

    num_tokens: int
    num_lines: int
    num_dims: int
    num_keys: int
    config: LaunchConfig


def blocks_of(architecture: Architecture, shape: HeadShape, dtype: torch.dtype, *, has_mask: bool) -> Blocks:
    """Choose the tile such that keys and values of every stage fit into shared memory, and nothing is spilled.

    A mask is read byte by byte into registers; rows that have one are short, so small tiles are no loss there.
    """
    group_lines = next_power_of_2(shape.group)
    if dtype is torch.float32:
        # No matrix unit multiplies float32 without loss; products fall to the vector units and their registers.
        num_lines = max(64 if shape.block_d <= 64 else 32, group_lines)
        config = LaunchConfig(num_warps=8, num_stages=1)
        return Blocks(num_lines // shape.group, num_lines, shape.block_d, 16, config)
    num_lines = max(128 if shape.block_d == 128 and not has_mask else 64, group_lines)
    num_stages = 1 if architecture.backend == "hip" else 3
    # An A100 multiplies from registers, which hold the queries too.
    is_tight = shape.block_d > (64 if architecture.name == "sm_80" else 128)
    num_keys = 32 if has_mask or is_tight else 64
    if architecture.name == "sm_90" and num_keys == 64:
        # Measured on an H100; of the others none has been timed.
        num_keys, num_stages = 128, 3 if shape.block_d <= 64 else 2
    num_warps = 4 if num_lines <= 64 and shape.block_d <= 64 else 8
    config = LaunchConfig(num_warps=num_warps, num_stages=num_stages)
    return Blocks(num_lines // shape.group, num_lines, shape.block_d, num_keys, config)


def extend_attention(  # noqa: PLR0913 (a tensor each)
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    page_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    *,
    scoring: Scoring,
    max_new_tokens: int,
    mask: TreeMask | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each row's new tokens over its cached ones and over the new ones up to each, all of them in the pages already.

    Args:
        queries: `[num_tokens, num_heads, head_dim]`, the rows' new tokens one row after another; tokens and heads may be strided.
        layer_pages: `[num_pages, page_size, 2, num_kv_heads, head_dim]`.
        page_tables: int32 or int64 `[num_rows, width]`; entries past a row's context are not read.
        query_starts: int32 or int64 `[num_rows + 1]`, index of each row's first new token, and one past the last.
        context_lengths: int32 or int64 `[num_rows]`, tokens of the row, the new ones included.
        scoring: How scores are made.
        max_new_tokens: No row has more new tokens; it decides the grid.
        mask: Visibility among new tokens; by default each sees those up to itself.
        out: Where to, like `queries`; tokens of no row are not written. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride, device or value is wrong.
    """
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if out is None else out
    visible, starts, positions = (None, None, None) if mask is None else (mask.is_visible, mask.starts, mask.positions)
    steps = (out, queries, layer_pages, page_tables, query_starts, context_lengths)
    rest = (starts, positions, scoring.sinks)
    launch = _plan(*steps, visible, *rest, scoring.scale, scoring.soft_cap, scoring.window, max_new_tokens)
    launch(*steps, None if visible is None else visible.view(torch.uint8), *rest)
    return out


@planned
def _plan(  # noqa: PLR0913 (a tensor each)
    out: torch.Tensor,
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    page_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    is_visible: torch.Tensor | None,
    mask_starts: torch.Tensor | None,
    mask_positions: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    window: int,
    max_new_tokens: int,
) -> Launch:
    """Check the arguments, and plan the launch on the tensors."""
    arguments = Arguments("extend_attention", queries.device)
    num_rows, num_tokens = context_lengths.shape[0], queries.shape[0]
    scoring = Scoring(scale, window, soft_cap, sinks)
    shape = check_tensors(arguments, queries, layer_pages, page_tables, num_rows=num_rows, scoring=scoring)
    arguments.tensor("context_lengths", context_lengths, shape=(None,), dtypes=INDEX_TYPES)
    arguments.tensor("query_starts", query_starts, shape=(num_rows + 1,), dtypes=INDEX_TYPES)
    arguments.require(0 <= max_new_tokens <= num_tokens, "max_new_tokens", f"0 to num_tokens = {num_tokens}", max_new_tokens)
    has_mask = is_visible is not None and mask_starts is not None and mask_positions is not None
    if is_visible is not None and mask_starts is not None and mask_positions is not None:
        within = max_new_tokens <= MASKED_TOKENS_MAX
        arguments.require(within, "max_new_tokens", f"at most {MASKED_TOKENS_MAX} with a mask", max_new_tokens)
        arguments.tensor("mask.is_visible", is_visible, shape=(None,), dtypes=(torch.bool,))
        arguments.tensor("mask.starts", mask_starts, shape=(num_rows,), dtypes=INDEX_TYPES)
        arguments.tensor("mask.positions", mask_positions, shape=(num_tokens,), dtypes=INDEX_TYPES)
    arguments.tensor("out", out, shape=queries.shape, dtypes=(queries.dtype,))
    blocks = blocks_of(architecture_of(queries.device), shape, queries.dtype, has_mask=has_mask)
    numbers = (
        scale,
        soft_cap,
        window,
        *out.stride()[:2],
        *queries.stride()[:2],
        *layer_pages.stride()[:4],
        page_tables.stride(0),
    )
    constants = {
        "HAS_SOFT_CAP": soft_cap > 0,
        "HAS_WINDOW": window > 0,
        "HAS_MASK": has_mask,
        "HAS_SINKS": sinks is not None,
        "GROUP": shape.group,
        "HEAD_DIM": shape.head_dim,
        "PAGE_SIZE": shape.page_size,
        "BLOCK_Q": blocks.num_tokens,
        "BLOCK_M": blocks.num_lines,
        "BLOCK_D": blocks.num_dims,
        "BLOCK_N": blocks.num_keys,
    }
    grid = (-(-max_new_tokens // blocks.num_tokens), shape.num_kv_heads, num_rows)
    return Launch(extend_attention_kernel, grid, numbers, constants, blocks.config)
