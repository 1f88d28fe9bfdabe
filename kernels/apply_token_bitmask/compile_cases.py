"""What is compiled and put on the roofline for excluding tokens by bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.apply_token_bitmask.kernel import apply_token_bitmask_kernel
from kernels.apply_token_bitmask.launch import BLOCK, CONFIG
from kernels.architecture import Architecture


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Types of logits and of rows."""
    for dtype, rows in ((torch.float32, "i64"), (torch.bfloat16, "i64"), (torch.float16, "i32")):
        types = {"logits_ptr": f"*{TYPE_NAMES[dtype]}", "bitmask_ptr": "*i32", "rows_ptr": f"*{rows}"}
        types |= dict.fromkeys(("num_rows", "vocab_size", "stride_logits_row", "stride_bitmask_mask"), "i32")
        unaligned = frozenset({"num_rows", "vocab_size", "stride_bitmask_mask"})
        label = f"{TYPE_NAMES[dtype]}, rows {rows}"
        yield CompileCase(label, apply_token_bitmask_kernel, types, {"BLOCK": BLOCK}, CONFIG, unaligned)


def workloads() -> Iterator[Workload]:
    """A vocabulary of 128256, of which a grammar allows little: read the bits, write nearly all logits."""
    num_bytes = 64 * (128256 // 8 + 128256 * 4)
    yield Workload("fp32 64 rows × 128256, nearly all excluded", num_bytes, 2 * 64 * 128256, "fp32")
