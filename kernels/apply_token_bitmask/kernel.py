"""Excluding tokens by bits, in Triton. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply_token_bitmask_kernel(
    logits_ptr,
    bitmask_ptr,
    rows_ptr,
    num_rows,
    vocab_size,
    stride_logits_row,
    stride_bitmask_mask,
    BLOCK: tl.constexpr,
):
    """Mask `BLOCK` tokens of one row a program; grid `[num_masks, blocks of vocab_size]`. Allowed logits are not touched."""
    mask_index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + mask_index).to(tl.int64)
    if (row >= 0) & (row < num_rows):
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_token = tokens < vocab_size
        words = tl.load(bitmask_ptr + mask_index * stride_bitmask_mask + tokens // 32, mask=is_token, other=0)
        is_excluded = ((words >> (tokens % 32)) & 1) == 0
        excluded = tl.full((BLOCK,), float("-inf"), dtype=tl.float32).to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + row * stride_logits_row + tokens, excluded, mask=is_token & is_excluded)
