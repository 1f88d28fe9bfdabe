"""Triton kernels of `lora`: grouped projections down and up, an adapter a segment of the batch. See README.md."""

import triton
import triton.language as tl


@triton.jit
def segment_rows(starts_ptr, adapters_ptr, order_ptr, HAS_ORDER: tl.constexpr, BLOCK_M: tl.constexpr):
    """Give this program's adapter (negative for none), its tokens, which of them count, and whether any does."""
    segment = tl.program_id(2)
    adapter = tl.load(adapters_ptr + segment).to(tl.int64)
    end = tl.load(starts_ptr + segment + 1)
    first = tl.load(starts_ptr + segment) + tl.program_id(1) * BLOCK_M
    places = first + tl.arange(0, BLOCK_M)
    is_row = places < end
    tokens = tl.load(order_ptr + places, mask=is_row, other=0) if HAS_ORDER else places
    return adapter, tokens.to(tl.int64), is_row, first < end


@triton.jit
def lora_shrink_kernel(
    x_ptr,
    a_ptr,
    ranks_ptr,
    starts_ptr,
    adapters_ptr,
    order_ptr,
    parts_ptr,
    num_inputs,
    rank_max,
    stride_x_token,
    stride_a_adapter,
    stride_a_slice,
    stride_a_row,
    stride_parts_split,
    stride_parts_token,
    HAS_ORDER: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`parts[split, t, slice] = x[t] @ a[adapter, slice].T` over the split's share of the inputs, in float32.

    A program owns BLOCK_M tokens of one segment, BLOCK_R rows of one slice and one of NUM_SPLITS shares of the inputs. Shares are
    added up by who reads the parts: a sum of fixed order, without atomics. Columns from the adapter's rank on become zero.
    """
    adapter, tokens, is_row, has_rows = segment_rows(starts_ptr, adapters_ptr, order_ptr, HAS_ORDER, BLOCK_M)
    if (adapter < 0) | (has_rows == 0):
        return
    rank = tl.load(ranks_ptr + adapter)
    num_blocks_r = tl.cdiv(rank_max, BLOCK_R)
    program = tl.program_id(0)
    split = program % NUM_SPLITS
    block_r = program // NUM_SPLITS % num_blocks_r
    slice_index = program // NUM_SPLITS // num_blocks_r
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    is_rank = rows < rank
    steps = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens[:, None] * stride_x_token + steps[None, :]
    a_ptr += adapter * stride_a_adapter + slice_index.to(tl.int64) * stride_a_slice
    a_ptrs = a_ptr + rows.to(tl.int64)[None, :] * stride_a_row + steps[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(split * BLOCK_K, num_inputs, NUM_SPLITS * BLOCK_K):
        is_step = first + steps < num_inputs
        x = tl.load(x_ptrs + first, mask=is_row[:, None] & is_step[None, :], other=0.0)
        a = tl.load(a_ptrs + first, mask=is_step[:, None] & is_rank[None, :], other=0.0)
        total = tl.dot(x, a, total, input_precision="ieee")
    parts_ptrs = parts_ptr + split.to(tl.int64) * stride_parts_split + tokens[:, None] * stride_parts_token
    parts_ptrs += (slice_index * rank_max + rows)[None, :]
    tl.store(parts_ptrs, total, mask=is_row[:, None] & (rows < rank_max)[None, :])


@triton.jit
def lora_expand_kernel(
    parts_ptr,
    b_ptr,
    ranks_ptr,
    scalings_ptr,
    starts_ptr,
    adapters_ptr,
    order_ptr,
    out_ptr,
    num_outputs,
    stride_parts_split,
    stride_parts_token,
    stride_b_adapter,
    stride_b_row,
    stride_out_token,
    HAS_ORDER: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`out[t] += scalings[adapter] * (sum of parts[:, t] @ b[adapter].T)` for one slice; pointers are moved to it by the host.

    A program owns BLOCK_M tokens of one segment and BLOCK_N outputs. The parts are rounded to b's type for the product, whose sum
    is float32; the addition is float32 and rounded once.
    """
    adapter, tokens, is_row, has_rows = segment_rows(starts_ptr, adapters_ptr, order_ptr, HAS_ORDER, BLOCK_M)
    if (adapter < 0) | (has_rows == 0):
        return
    rank = tl.load(ranks_ptr + adapter)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < num_outputs
    steps = tl.arange(0, BLOCK_R)
    parts_ptrs = parts_ptr + tokens[:, None] * stride_parts_token + steps[None, :]
    b_ptrs = b_ptr + adapter * stride_b_adapter + columns.to(tl.int64)[None, :] * stride_b_row + steps[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, rank, BLOCK_R):
        is_step = first + steps < rank
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            split_ptrs = parts_ptrs + first + tl.full((1, 1), split, tl.int64) * stride_parts_split
            h += tl.load(split_ptrs, mask=is_row[:, None] & is_step[None, :], other=0.0)
        b = tl.load(b_ptrs + first, mask=is_step[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(h.to(b.dtype), b, total, input_precision="ieee")
    inside = is_row[:, None] & is_column[None, :]
    out_ptrs = out_ptr + tokens[:, None] * stride_out_token + columns[None, :]
    base = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    total = base + total * tl.load(scalings_ptr + adapter)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)
