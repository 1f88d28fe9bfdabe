"""RMS normalisation in Triton, alone and fused with the addition of the residual. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    num_heads,
    hidden_size,
    stride_x_token,
    stride_x_head,
    stride_residual_token,
    stride_out_token,
    stride_out_head,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise `ROWS` rows a program; a row is one head of one token. The residual, where there is one, becomes the sum, in place.

    A row is summed in an order that depends on `BLOCK` alone, in float32: its result does not depend on its neighbours.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    tokens, heads = rows // num_heads, rows % num_heads
    mask = (rows < num_rows)[:, None] & (columns < hidden_size)[None, :]
    # [ROWS, BLOCK]
    x_offsets = (tokens * stride_x_token + heads * stride_x_head)[:, None] + columns[None, :]
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + (tokens * stride_residual_token)[:, None] + columns[None, :]
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        # The sum is rounded before it is normalised, as if two kernels had run.
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, total, mask=mask)
        x = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / hidden_size + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < hidden_size, other=0.0).to(tl.float32) + weight_offset
    y = x * scale[:, None] * weight[None, :]
    out_offsets = (tokens * stride_out_token + heads * stride_out_head)[:, None] + columns[None, :]
    tl.store(out_ptr + out_offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
