"""What is compiled and put on the roofline for RMS normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.rms_norm.kernel import rms_norm_kernel
from kernels.rms_norm.launch import blocks_of


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Plain and fused, from one head to the longest rows of today's models."""
    for dtype, hidden_size, has_residual in (
        (torch.bfloat16, 4096, True),
        (torch.bfloat16, 4096, False),
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 576, True),
        (torch.bfloat16, 16384, True),
        (torch.float16, 4096, True),
        (torch.float32, 8192, True),
    ):
        yield _case(dtype, hidden_size, has_residual=has_residual)


def workloads() -> Iterator[Workload]:
    """Decode and prefill of a hidden size of 4096: read x and residual, write both; about four operations an element."""
    for num_tokens in (64, 4096):
        size = num_tokens * 4096
        yield Workload(f"add_rms_norm bf16 {num_tokens} × 4096", 4 * 2 * size + 2 * 4096, 5 * size, "fp32")


def _case(dtype: torch.dtype, hidden_size: int, *, has_residual: bool) -> CompileCase:
    blocks = blocks_of(hidden_size)
    pointer = "*" + TYPE_NAMES[dtype]
    types = {"x_ptr": pointer, "weight_ptr": pointer, "out_ptr": pointer, "eps": "fp32", "weight_offset": "fp32"}
    types |= dict.fromkeys(("num_rows", "num_heads", "hidden_size", "stride_x_token", "stride_x_head"), "i32")
    types |= dict.fromkeys(("stride_residual_token", "stride_out_token", "stride_out_head"), "i32")
    constants: dict[str, object] = {"HAS_RESIDUAL": has_residual, "ROWS": blocks.num_rows, "BLOCK": blocks.num_columns}
    if has_residual:
        types["residual_ptr"] = pointer
    else:
        constants["residual_ptr"] = None
    label = f"{TYPE_NAMES[dtype]}, {hidden_size} columns{', residual' if has_residual else ''}"
    return CompileCase(
        label, rms_norm_kernel, types, constants, blocks.config, unaligned=frozenset({"num_rows", "num_heads"}), is_hot=True
    )
