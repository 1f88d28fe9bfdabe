"""Attention of one new token a row, in Triton: long contexts are split, and a second pass joins the parts. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.online_softmax import absorb, add_sink, factor_of, score


@triton.jit
def split_range(
    length,
    split,
    window,
    HAS_WINDOW: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS_MIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Say which tokens a split of a row takes, and into how many splits the row falls: by its length alone.

    Returns:
        First token, one past the last, first token that is visible, number of splits.
    """
    visible_from = tl.maximum(length - window, 0) if HAS_WINDOW else length * 0
    first = visible_from // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - first, MAX_SPLITS), BLOCK_N) * BLOCK_N
    split_tokens = tl.maximum(share, SPLIT_TOKENS_MIN)
    begin = first + split * split_tokens
    return begin, tl.minimum(begin + split_tokens, length), visible_from, tl.cdiv(length - first, split_tokens)


@triton.jit
def pages_of(table_ptr, tokens, end, PAGE_SIZE: tl.constexpr):
    """Read which pages a row's tokens lie in. The loop reads them a block ahead: keys and values then wait for no other load."""
    return tl.load(table_ptr + tokens // PAGE_SIZE, mask=tokens < end, other=0).to(tl.int32)


@triton.jit(
    do_not_specialize=["stride_log_sums_row", "stride_log_sums_head", "stride_page_tables_row"],
    do_not_specialize_on_alignment=["page_tables_ptr", "lengths_ptr"],
)
def paged_decode_attention_split_kernel(
    out_ptr,
    partials_ptr,
    log_sums_ptr,
    queries_ptr,
    pages_ptr,
    page_tables_ptr,
    lengths_ptr,
    sinks_ptr,
    scale,
    soft_cap,
    window,
    stride_out_row,
    stride_out_head,
    stride_partials_row,
    stride_partials_head,
    stride_partials_split,
    stride_log_sums_row,
    stride_log_sums_head,
    stride_queries_row,
    stride_queries_head,
    stride_pages_page,
    stride_pages_offset,
    stride_pages_kv,
    stride_pages_head,
    stride_page_tables_row,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS_MIN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend the query heads of one key-value head over one split of one row; grid `[num_rows, num_kv_heads, num_splits]`.

    A row of one split is finished here. Of others, the normalised part and the logarithm (base 2) of its sum are left for the
    reduction, both float32.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    begin, end, visible_from, num_splits = split_range(length, split, window, HAS_WINDOW, MAX_SPLITS, SPLIT_TOKENS_MIN, BLOCK_N)
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + group
    is_part = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptrs = out_ptr + row * stride_out_row + heads[:, None] * stride_out_head + dims[None, :]
    if (length <= 0) & (split == 0):
        tl.store(out_ptrs, tl.zeros((BLOCK_G, BLOCK_D), dtype=out_ptr.dtype.element_ty), mask=is_part)
    if split < num_splits:
        query_ptrs = queries_ptr + row * stride_queries_row + heads[:, None] * stride_queries_head + dims[None, :]
        queries = tl.load(query_ptrs, mask=is_part, other=0.0)
        maximum = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_G,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
        table_ptr = page_tables_ptr + row * stride_page_tables_row
        head_ptr = pages_ptr + kv_head * stride_pages_head
        factor = factor_of(scale, HAS_SOFT_CAP)
        pages = pages_of(table_ptr, begin + tl.arange(0, BLOCK_N), end, PAGE_SIZE)
        for position in range(begin, end, BLOCK_N):
            tokens = position + tl.arange(0, BLOCK_N)
            is_context = tokens < end
            places = pages.to(tl.int64) * stride_pages_page + (tokens % PAGE_SIZE) * stride_pages_offset
            pages = pages_of(table_ptr, tokens + BLOCK_N, end, PAGE_SIZE)
            # Of keys and of values: [BLOCK_N, BLOCK_D].
            key_ptrs = head_ptr + (places[:, None] + dims[None, :])
            is_stored = is_context[:, None] & (dims < HEAD_DIM)[None, :]
            keys = tl.load(key_ptrs, mask=is_stored, other=0.0)
            values = tl.load(key_ptrs + stride_pages_kv, mask=is_stored, other=0.0)
            scores = score(queries, keys, scale, soft_cap, HAS_SOFT_CAP)
            is_visible = is_context & (tokens >= visible_from)
            scores = tl.where(is_visible[None, :], scores, float("-inf"))
            maximum, total, weighted = absorb(scores, factor, values, maximum, total, weighted)
        if num_splits == 1:
            if HAS_SINKS:
                sinks = tl.load(sinks_ptr + heads, mask=group < GROUP, other=0.0)
                maximum, total, shrink = add_sink(sinks, maximum, total)
                weighted = weighted * shrink[:, None]
            out = weighted / total[:, None]
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_part)
        else:
            partial_ptrs = partials_ptr + row * stride_partials_row + heads * stride_partials_head + split * stride_partials_split
            tl.store(partial_ptrs[:, None] + dims[None, :], weighted / total[:, None], mask=is_part)
            log_sum_ptrs = log_sums_ptr + row * stride_log_sums_row + heads * stride_log_sums_head + split
            tl.store(log_sum_ptrs, maximum + tl.log2(total), mask=group < GROUP)


@triton.jit(do_not_specialize=["stride_log_sums_row", "stride_log_sums_head"], do_not_specialize_on_alignment=["lengths_ptr"])
def paged_decode_attention_reduce_kernel(
    out_ptr,
    partials_ptr,
    log_sums_ptr,
    lengths_ptr,
    sinks_ptr,
    window,
    stride_out_row,
    stride_out_head,
    stride_partials_row,
    stride_partials_head,
    stride_partials_split,
    stride_log_sums_row,
    stride_log_sums_head,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS_MIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Put the parts of one head of one row together; grid `[num_rows, num_heads]`. Rows of one split are done already."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    _, _, _, num_splits = split_range(length, 0, window, HAS_WINDOW, MAX_SPLITS, SPLIT_TOKENS_MIN, BLOCK_N)
    if num_splits > 1:
        splits = tl.arange(0, MAX_SPLITS)
        dims = tl.arange(0, BLOCK_D)
        log_sum_ptrs = log_sums_ptr + row * stride_log_sums_row + head * stride_log_sums_head + splits
        log_sums = tl.load(log_sum_ptrs, mask=splits < num_splits, other=float("-inf"))
        maximum = tl.max(log_sums, axis=0)
        weights = tl.exp2(log_sums - maximum)
        total = tl.sum(weights, axis=0)
        if HAS_SINKS:
            maximum, total, shrink = add_sink(tl.load(sinks_ptr + head), maximum, total)
            weights = weights * shrink
        partial_ptrs = partials_ptr + row * stride_partials_row + head * stride_partials_head
        partial_ptrs = partial_ptrs + splits[:, None] * stride_partials_split + dims[None, :]
        mask = (splits < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
        # [MAX_SPLITS, BLOCK_D]
        partials = tl.load(partial_ptrs, mask=mask, other=0.0)
        out = tl.sum(partials * weights[:, None], axis=0) / total
        out_ptrs = out_ptr + row * stride_out_row + head * stride_out_head + dims
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
