"""Attention of several new tokens a row over a paged context, in Triton. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.online_softmax import absorb, add_sink, factor_of, score


@triton.jit
def visible_keys(
    tokens, positions, indices, num_cached, num_new, window, mask_ptr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Say which `tokens: [N]` of a row each query sees: `[M, N]`. `indices: [M]` counts its new tokens, `positions: [M]` all."""
    is_visible = tokens[None, :] <= positions[:, None]
    if HAS_WINDOW:
        is_visible = is_visible & (tokens[None, :] > positions[:, None] - window)
    if HAS_MASK:
        # The row's mask alone decides among new tokens. 32 bits: the launch bounds the new tokens of a row with a mask.
        new = tokens - num_cached
        is_pair = (indices < num_new)[:, None] & ((new >= 0) & (new < num_new))[None, :]
        bits = tl.load(mask_ptr + (indices[:, None] * num_new + new[None, :]), mask=is_pair, other=0)
        is_visible = (is_visible & (new < 0)[None, :]) | (bits != 0)
    return is_visible


@triton.jit
def pages_of(table_ptr, tokens, context, PAGE_SIZE: tl.constexpr):
    """Read which pages a row's tokens lie in. A loop reads them a block ahead: keys and values then wait for no other load."""
    return tl.load(table_ptr + tokens // PAGE_SIZE, mask=tokens < context, other=0).to(tl.int32)


@triton.jit
def keys_and_values(
    head_ptr,
    places,
    is_context,
    stride_pages_kv,
    IS_WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load keys and values, `[N, BLOCK_D]` each, at `places: [N]`; `IS_WHOLE`: all of them are of the context."""
    dims = tl.arange(0, BLOCK_D)
    key_ptrs = head_ptr + (places[:, None] + dims[None, :])
    if IS_WHOLE and HEAD_DIM == BLOCK_D:
        keys, values = tl.load(key_ptrs), tl.load(key_ptrs + stride_pages_kv)
    else:
        is_part = is_context[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_ptrs, mask=is_part, other=0.0)
        values = tl.load(key_ptrs + stride_pages_kv, mask=is_part, other=0.0)
    return keys, values


@triton.jit(
    do_not_specialize=["stride_page_tables_row"],
    do_not_specialize_on_alignment=["page_tables_ptr", "query_starts_ptr", "context_lengths_ptr"],
)
def extend_attention_kernel(
    out_ptr,
    queries_ptr,
    pages_ptr,
    page_tables_ptr,
    query_starts_ptr,
    context_lengths_ptr,
    mask_ptr,
    mask_starts_ptr,
    positions_ptr,
    sinks_ptr,
    scale,
    soft_cap,
    window,
    stride_out_token,
    stride_out_head,
    stride_queries_token,
    stride_queries_head,
    stride_pages_page,
    stride_pages_offset,
    stride_pages_kv,
    stride_pages_head,
    stride_page_tables_row,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend `BLOCK_Q` new tokens of one row with all query heads of one key-value head.

    Grid `[blocks of the longest row, num_kv_heads, num_rows]`. Line `m` of the tile, of `BLOCK_M >= BLOCK_Q * GROUP`, is token
    `m // GROUP` with head `m % GROUP`. Keys are walked from a multiple of `BLOCK_N` on, whichever tokens share a tile, so that a
    token's sums do not depend on how its prompt was cut.
    """
    # The last tokens see most: they go first, so that no long program is left alone at the end.
    first_index, kv_head = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q, tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    start = tl.load(query_starts_ptr + row).to(tl.int64)
    num_new = (tl.load(query_starts_ptr + row + 1).to(tl.int64) - start).to(tl.int32)
    if first_index < num_new:
        context = tl.load(context_lengths_ptr + row).to(tl.int32)
        num_cached = context - num_new
        lines = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        indices = first_index + lines // GROUP
        heads = kv_head * GROUP + lines % GROUP
        is_line = (lines < BLOCK_Q * GROUP) & (indices < num_new)
        is_part = is_line[:, None] & (dims < HEAD_DIM)[None, :]
        query_tokens = start + indices
        query_places = query_tokens * stride_queries_token + heads * stride_queries_head
        queries = tl.load(queries_ptr + query_places[:, None] + dims[None, :], mask=is_part, other=0.0)
        if HAS_MASK:
            positions = tl.load(positions_ptr + query_tokens, mask=is_line, other=0).to(tl.int32)
            mask_ptr += tl.load(mask_starts_ptr + row).to(tl.int64)
            end = context
        else:
            positions = num_cached + indices
            end = tl.minimum(context, num_cached + first_index + BLOCK_Q)
        begin = num_cached * 0
        # Up to here every line sees all keys: nothing is masked, unless a window is.
        whole_end = num_cached + first_index + 1
        if HAS_WINDOW or HAS_MASK:
            lowest = tl.min(tl.where(is_line, positions, context), axis=0)
            # New tokens are the mask's matter, wherever the window begins.
            whole_end = tl.minimum(lowest + 1, num_cached) if HAS_MASK else whole_end
        if HAS_WINDOW:
            lowest = lowest - window + 1
            lowest = tl.minimum(lowest, num_cached) if HAS_MASK else lowest
            begin = tl.maximum(lowest, 0) // BLOCK_N * BLOCK_N
            whole_end = begin
        whole_end = tl.maximum(whole_end, 0) // BLOCK_N * BLOCK_N
        maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        table_ptr = page_tables_ptr + row * stride_page_tables_row
        head_ptr = pages_ptr + kv_head * stride_pages_head
        factor = factor_of(scale, HAS_SOFT_CAP)
        keys_range = tl.arange(0, BLOCK_N)
        pages = pages_of(table_ptr, begin + keys_range, context, PAGE_SIZE)
        for position in range(begin, whole_end, BLOCK_N):
            tokens = position + keys_range
            places = pages.to(tl.int64) * stride_pages_page + (tokens % PAGE_SIZE) * stride_pages_offset
            pages = pages_of(table_ptr, tokens + BLOCK_N, context, PAGE_SIZE)
            keys, values = keys_and_values(head_ptr, places, tokens < context, stride_pages_kv, True, HEAD_DIM, BLOCK_D)
            scores = score(queries, keys, scale, soft_cap, HAS_SOFT_CAP)
            maximum, total, weighted = absorb(scores, factor, values, maximum, total, weighted)
        for position in range(whole_end, end, BLOCK_N):
            tokens = position + keys_range
            is_context = tokens < context
            places = pages.to(tl.int64) * stride_pages_page + (tokens % PAGE_SIZE) * stride_pages_offset
            pages = pages_of(table_ptr, tokens + BLOCK_N, context, PAGE_SIZE)
            keys, values = keys_and_values(head_ptr, places, is_context, stride_pages_kv, False, HEAD_DIM, BLOCK_D)
            scores = score(queries, keys, scale, soft_cap, HAS_SOFT_CAP)
            is_visible = visible_keys(tokens, positions, indices, num_cached, num_new, window, mask_ptr, HAS_WINDOW, HAS_MASK)
            scores = tl.where(is_visible & is_context[None, :], scores, float("-inf"))
            maximum, total, weighted = absorb(scores, factor, values, maximum, total, weighted)
        if HAS_SINKS:
            sinks = tl.load(sinks_ptr + heads, mask=is_line, other=0.0)
            maximum, total, shrink = add_sink(sinks, maximum, total)
            weighted = weighted * shrink[:, None]
        # A query that sees nothing gives 0.
        out = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
        out_places = query_tokens * stride_out_token + heads * stride_out_head
        tl.store(out_ptr + out_places[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=is_part)
