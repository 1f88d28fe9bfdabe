"""Writing keys and values into pages, in Triton. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["slot_mapping_ptr"])
def store_kv_kernel(
    keys_ptr,
    values_ptr,
    pages_ptr,
    slot_mapping_ptr,
    num_slots,
    row_size,
    stride_keys_token,
    stride_keys_head,
    stride_values_token,
    stride_values_head,
    stride_pages_page,
    stride_pages_offset,
    stride_pages_kv,
    stride_pages_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one token's keys and values, `BLOCK` elements of each a program; grid `[num_tokens, blocks of row_size]`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    # A graph's padding has no place of its own, and a wrong slot must not reach another's memory.
    if (slot >= 0) & (slot < num_slots):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < row_size
        heads, elements = (columns // HEAD_DIM).to(tl.int64), columns % HEAD_DIM
        place = pages_ptr + (slot // PAGE_SIZE) * stride_pages_page + (slot % PAGE_SIZE) * stride_pages_offset
        place += heads * stride_pages_head + elements
        keys = tl.load(keys_ptr + token * stride_keys_token + heads * stride_keys_head + elements, mask=mask, other=0.0)
        tl.store(place, keys.to(pages_ptr.dtype.element_ty), mask=mask)
        values = tl.load(values_ptr + token * stride_values_token + heads * stride_values_head + elements, mask=mask, other=0.0)
        tl.store(place + stride_pages_kv, values.to(pages_ptr.dtype.element_ty), mask=mask)
