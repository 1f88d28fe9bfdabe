"""What is compiled and put on the roofline for rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.rotary.kernel import rotary_kernel
from kernels.rotary.launch import CONFIG, blocks_of


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Both layouts, whole and partial, each type."""
    for dtype, half, is_interleaved in (
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 32, False),
        (torch.bfloat16, 40, False),
        (torch.float16, 64, False),
        (torch.float32, 128, False),
    ):
        yield _case(dtype, half, is_interleaved=is_interleaved)


def workloads() -> Iterator[Workload]:
    """32 query and 8 key heads of 128: read and write each, and read the table's row; three operations an element."""
    for num_tokens in (64, 4096):
        size = num_tokens * 40 * 128
        yield Workload(f"bf16 {num_tokens} tokens, 40 heads of 128", 2 * 2 * size + num_tokens * 2 * 64 * 4, 3 * size, "fp32")


def _case(dtype: torch.dtype, half: int, *, is_interleaved: bool) -> CompileCase:
    name, blocks = TYPE_NAMES[dtype], blocks_of(half)
    types = {"queries_ptr": f"*{name}", "keys_ptr": f"*{name}", "positions_ptr": "*i64", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    types |= dict.fromkeys(("num_positions", "num_heads", "num_kv_heads", "stride_queries_token", "stride_queries_head"), "i32")
    types |= dict.fromkeys(("stride_keys_token", "stride_keys_head", "stride_table_position"), "i32")
    constants = {"HALF": half, "IS_INTERLEAVED": is_interleaved, "HEADS": blocks.num_heads, "BLOCK": blocks.num_pairs}
    label = f"{name}, {half} pairs, {'interleaved' if is_interleaved else 'halves'}"
    unaligned = frozenset({"num_positions", "num_heads", "num_kv_heads"})
    return CompileCase(label, rotary_kernel, types, constants, CONFIG, unaligned, is_hot=True)
