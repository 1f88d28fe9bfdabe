"""Rotary position embedding of queries and keys in one launch, in Triton. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn_heads(
    base_ptr,
    first_head,
    num_heads,
    stride_head,
    cos,
    sin,
    HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn `HEADS` heads of one token, in place; `cos` and `sin` are `[BLOCK]`."""
    heads = first_head + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    mask = (heads < num_heads)[:, None] & (pairs < HALF)[None, :]
    rows = base_ptr + heads.to(tl.int64)[:, None] * stride_head
    if IS_INTERLEAVED:
        first_ptrs = rows + 2 * pairs[None, :]
        second_ptrs = first_ptrs + 1
    else:
        first_ptrs = rows + pairs[None, :]
        second_ptrs = first_ptrs + HALF
    first = tl.load(first_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptrs, mask=mask, other=0.0).to(tl.float32)
    turned_first = first * cos[None, :] - second * sin[None, :]
    turned_second = second * cos[None, :] + first * sin[None, :]
    tl.store(first_ptrs, turned_first.to(base_ptr.dtype.element_ty), mask=mask)
    tl.store(second_ptrs, turned_second.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def rotary_kernel(
    queries_ptr,
    keys_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    num_positions,
    num_heads,
    num_kv_heads,
    stride_queries_token,
    stride_queries_head,
    stride_keys_token,
    stride_keys_head,
    stride_table_position,
    HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn `HEADS` heads of one token a program; grid `[num_tokens, blocks of query heads + blocks of key heads]`.

    Each program reads what it alone writes, so turning in place is safe.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if (position >= 0) & (position < num_positions):
        pairs = tl.arange(0, BLOCK)
        row = position * stride_table_position + pairs
        cos = tl.load(cos_ptr + row, mask=pairs < HALF, other=0.0)
        sin = tl.load(sin_ptr + row, mask=pairs < HALF, other=0.0)
        num_query_blocks = tl.cdiv(num_heads, HEADS)
        if block < num_query_blocks:
            base = queries_ptr + token * stride_queries_token
            turn_heads(base, block * HEADS, num_heads, stride_queries_head, cos, sin, HALF, IS_INTERLEAVED, HEADS, BLOCK)
        else:
            base = keys_ptr + token * stride_keys_token
            first_head = (block - num_query_blocks) * HEADS
            turn_heads(base, first_head, num_kv_heads, stride_keys_head, cos, sin, HALF, IS_INTERLEAVED, HEADS, BLOCK)
