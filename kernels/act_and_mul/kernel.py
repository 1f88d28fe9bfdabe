"""Gated activations in Triton: one pass over gate and up. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply an activation to float32."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 is the sigmoid of 2 z; z = sqrt(2 / pi) (x + 0.044715 x³).
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def act_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    size,
    stride_gate_up_token,
    stride_out_token,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute `BLOCK` elements of one token a program; grid `[num_tokens, blocks of size]`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate_ptrs = gate_up_ptr + token * stride_gate_up_token + columns
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
    y = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + token * stride_out_token + columns, y.to(out_ptr.dtype.element_ty), mask=mask)
