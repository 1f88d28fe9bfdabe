"""What is compiled and put on the roofline for gated activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.act_and_mul.kernel import act_and_mul_kernel
from kernels.act_and_mul.launch import ACTIVATIONS, CONFIG, block_of
from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Every activation in bfloat16, SiLU in every type and for short rows."""
    for activation in ACTIVATIONS:
        yield _case(torch.bfloat16, activation, 14336)
    yield _case(torch.bfloat16, "silu", 96)
    for dtype in (torch.float16, torch.float32):
        yield _case(dtype, "silu", 14336)


def workloads() -> Iterator[Workload]:
    """Decode and prefill of an intermediate size of 14336: two reads and a write, about six operations an element."""
    for num_tokens in (64, 4096):
        size = num_tokens * 14336
        yield Workload(f"silu_and_mul bf16 {num_tokens} × 14336", 3 * 2 * size, 6 * size, "fp32")


def _case(dtype: torch.dtype, activation: str, size: int) -> CompileCase:
    name, block = TYPE_NAMES[dtype], block_of(size)
    types = {"gate_up_ptr": f"*{name}", "out_ptr": f"*{name}"}
    types |= dict.fromkeys(("size", "stride_gate_up_token", "stride_out_token"), "i32")
    constants = {"ACTIVATION": activation, "BLOCK": block}
    return CompileCase(f"{name}, {activation}, block {block}", act_and_mul_kernel, types, constants, CONFIG, is_hot=True)
