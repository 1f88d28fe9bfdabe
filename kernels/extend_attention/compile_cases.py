"""What is compiled and put on the roofline for extend attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.attention_inputs import HeadShape
from kernels.extend_attention.kernel import extend_attention_kernel
from kernels.extend_attention.launch import blocks_of

_FEATURES = ("SOFT_CAP", "WINDOW", "MASK", "SINKS")


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Groupings, head sizes, page sizes, types, and everything a model may ask of scores."""
    llama = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
    for dtype, shape, features in (
        (torch.bfloat16, llama, ()),
        (torch.bfloat16, llama, ("SOFT_CAP", "WINDOW", "SINKS")),
        (torch.bfloat16, llama, ("MASK",)),
        (torch.bfloat16, HeadShape(32, 8, 128, 1), ("WINDOW", "MASK")),
        (torch.bfloat16, HeadShape(64, 8, 64, 64), ("WINDOW", "SINKS")),
        (torch.bfloat16, HeadShape(16, 8, 256, 16), ("SOFT_CAP", "WINDOW")),
        (torch.bfloat16, HeadShape(32, 32, 96, 16), ("WINDOW",)),
        (torch.bfloat16, HeadShape(9, 3, 64, 16), ()),
        (torch.bfloat16, HeadShape(71, 1, 64, 16), ()),
        (torch.float16, llama, _FEATURES),
        (torch.float32, llama, ()),
        (torch.float32, HeadShape(16, 8, 256, 16), ()),
    ):
        yield _case(architecture, dtype, shape, features)
    yield _case(architecture, torch.bfloat16, llama, (), indices="i32")


def workloads() -> Iterator[Workload]:
    """Llama 3's 8B shape: a fresh prompt, and a chunk over a long cached prefix."""
    for num_new, num_cached in ((8192, 0), (2048, 30720)):
        context = num_new + num_cached
        num_pairs = num_new * num_cached + num_new * (num_new + 1) // 2
        num_bytes = context * 2 * 8 * 128 * 2 + num_new * 2 * 32 * 128 * 2
        label = f"bf16 {num_new} new over {num_cached} cached, 32 heads on 8 of 128"
        yield Workload(label, num_bytes, num_pairs * 32 * 128 * 4, "fp16")


def _case(
    architecture: Architecture, dtype: torch.dtype, shape: HeadShape, features: tuple[str, ...], *, indices: str = "i64"
) -> CompileCase:
    name, blocks = TYPE_NAMES[dtype], blocks_of(architecture, shape, dtype, has_mask="MASK" in features)
    types = dict.fromkeys(("out_ptr", "queries_ptr", "pages_ptr"), f"*{name}")
    types |= dict.fromkeys(("page_tables_ptr", "query_starts_ptr", "context_lengths_ptr"), f"*{indices}")
    types |= {"scale": "fp32", "soft_cap": "fp32", "window": "i32"}
    strides = ("out_token", "out_head", "queries_token", "queries_head", "pages_page", "pages_offset", "pages_kv", "pages_head")
    types |= dict.fromkeys((f"stride_{each}" for each in (*strides, "page_tables_row")), "i32")
    constants: dict[str, object] = {f"HAS_{each}": each in features for each in _FEATURES}
    constants |= {"GROUP": shape.group, "HEAD_DIM": shape.head_dim, "PAGE_SIZE": shape.page_size}
    constants |= {"BLOCK_Q": blocks.num_tokens, "BLOCK_M": blocks.num_lines}
    constants |= {"BLOCK_D": blocks.num_dims, "BLOCK_N": blocks.num_keys}
    optional = {"mask_ptr": ("MASK", "*u8"), "mask_starts_ptr": ("MASK", f"*{indices}"), "positions_ptr": ("MASK", f"*{indices}")}
    for argument, (feature, kind) in (optional | {"sinks_ptr": ("SINKS", "*fp32")}).items():
        if feature in features:
            types[argument] = kind
        else:
            constants[argument] = None
    extra = "".join(f", {each.lower().replace('_', ' ')}" for each in features)
    extra += "" if indices == "i64" else f", indices {indices}"
    label = f"{name}, {shape.num_heads} heads on {shape.num_kv_heads} of {shape.head_dim}, page {shape.page_size}{extra}"
    unaligned = frozenset({"window", "stride_page_tables_row"})
    return CompileCase(label, extend_attention_kernel, types, constants, blocks.config, unaligned, is_hot=dtype.itemsize == 2)
