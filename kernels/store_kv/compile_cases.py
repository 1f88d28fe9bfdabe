"""What is compiled and put on the roofline for storing keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.store_kv.kernel import store_kv_kernel
from kernels.store_kv.launch import CONFIG, block_of


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Types, head sizes, page sizes and types of slots."""
    yield _case(torch.bfloat16, num_heads=8, head_dim=128, page_size=16, slots="i64")
    yield _case(torch.bfloat16, num_heads=8, head_dim=128, page_size=1, slots="i32")
    yield _case(torch.float16, num_heads=3, head_dim=64, page_size=64, slots="i64")
    yield _case(torch.float32, num_heads=8, head_dim=80, page_size=16, slots="i64")


def workloads() -> Iterator[Workload]:
    """Eight heads of 128: read and write keys and values."""
    for num_tokens in (64, 4096):
        yield Workload(f"bf16 {num_tokens} tokens, 8 heads of 128", num_tokens * (2 * 2 * 2 * 1024 + 8), 0, "fp32")


def _case(dtype: torch.dtype, *, num_heads: int, head_dim: int, page_size: int, slots: str) -> CompileCase:
    name, block = TYPE_NAMES[dtype], block_of(num_heads * head_dim)
    types = dict.fromkeys(("keys_ptr", "values_ptr", "pages_ptr"), f"*{name}") | {"slot_mapping_ptr": f"*{slots}"}
    types |= dict.fromkeys(("num_slots", "row_size", "stride_keys_token", "stride_keys_head"), "i32")
    types |= dict.fromkeys(("stride_values_token", "stride_values_head", "stride_pages_page", "stride_pages_offset"), "i32")
    types |= dict.fromkeys(("stride_pages_kv", "stride_pages_head"), "i32")
    constants = {"PAGE_SIZE": page_size, "HEAD_DIM": head_dim, "BLOCK": block}
    label = f"{name}, {num_heads} heads of {head_dim}, page {page_size}, slots {slots}"
    return CompileCase(label, store_kv_kernel, types, constants, CONFIG, unaligned=frozenset({"num_slots"}), is_hot=True)
