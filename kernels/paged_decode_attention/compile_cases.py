"""What is compiled and put on the roofline for decode attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.attention_inputs import HeadShape
from kernels.paged_decode_attention.kernel import paged_decode_attention_reduce_kernel, paged_decode_attention_split_kernel
from kernels.paged_decode_attention.launch import MAX_SPLITS, REDUCE_CONFIG, SPLIT_TOKENS_MIN, blocks_of

_FEATURES = ("SOFT_CAP", "WINDOW", "SINKS")


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Groupings, head sizes, page sizes, types, and everything a model may ask of scores."""
    llama = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
    for dtype, shape, features in (
        (torch.bfloat16, llama, ()),
        (torch.bfloat16, HeadShape(32, 8, 128, 1), ()),
        (torch.bfloat16, HeadShape(32, 8, 128, 64), ("WINDOW",)),
        (torch.bfloat16, HeadShape(64, 8, 64, 16), ("WINDOW", "SINKS")),
        (torch.bfloat16, HeadShape(16, 8, 256, 16), ("SOFT_CAP", "WINDOW")),
        (torch.bfloat16, HeadShape(9, 3, 64, 16), ()),
        (torch.bfloat16, HeadShape(32, 32, 80, 16), ()),
        (torch.bfloat16, HeadShape(71, 1, 64, 16), ()),
        (torch.float16, llama, _FEATURES),
        (torch.float32, llama, ()),
        (torch.float32, HeadShape(16, 8, 256, 16), ()),
    ):
        yield _split_case(architecture, dtype, shape, features)
    yield _split_case(architecture, torch.bfloat16, llama, (), indices="i32")
    for dtype, head_dim, features in (
        (torch.bfloat16, 128, ()),
        (torch.bfloat16, 64, ("WINDOW", "SINKS")),
        (torch.bfloat16, 256, ("WINDOW",)),
        (torch.float16, 128, ()),
        (torch.float32, 256, ()),
    ):
        yield _reduce_case(architecture, dtype, head_dim, features)


def workloads() -> Iterator[Workload]:
    """Llama 3's 8B shape: keys and values are read once, each query head multiplies with all of them twice."""
    for num_rows, length in ((1, 131072), (64, 4096)):
        num_tokens = num_rows * length
        num_bytes = num_tokens * 2 * 8 * 128 * 2 + num_rows * (2 * 32 * 128 * 2 + length // 16 * 8)
        label = f"bf16 {num_rows} rows of {length}, 32 heads on 8 of 128"
        yield Workload(label, num_bytes, num_tokens * 32 * 128 * 4, "fp16")


def _label(dtype: torch.dtype, features: tuple[str, ...], what: str) -> str:
    extra = "".join(f", {name.lower().replace('_', ' ')}" for name in features)
    return f"{TYPE_NAMES[dtype]}, {what}{extra}"


def _strides(*names: str) -> dict[str, str]:
    return dict.fromkeys((f"stride_{name}" for name in names), "i32")


def _split_case(
    architecture: Architecture, dtype: torch.dtype, shape: HeadShape, features: tuple[str, ...], *, indices: str = "i64"
) -> CompileCase:
    name, blocks = TYPE_NAMES[dtype], blocks_of(architecture, shape, dtype)
    types = dict.fromkeys(("out_ptr", "queries_ptr", "pages_ptr"), f"*{name}")
    types |= {"partials_ptr": "*fp32", "log_sums_ptr": "*fp32", "page_tables_ptr": f"*{indices}", "lengths_ptr": f"*{indices}"}
    types |= {"scale": "fp32", "soft_cap": "fp32", "window": "i32"}
    types |= _strides("out_row", "out_head", "partials_row", "partials_head", "partials_split", "log_sums_row", "log_sums_head")
    types |= _strides("queries_row", "queries_head", "pages_page", "pages_offset", "pages_kv", "pages_head", "page_tables_row")
    constants: dict[str, object] = {f"HAS_{each}": each in features for each in _FEATURES}
    constants |= {"GROUP": shape.group, "HEAD_DIM": shape.head_dim, "PAGE_SIZE": shape.page_size}
    constants |= {"MAX_SPLITS": MAX_SPLITS, "SPLIT_TOKENS_MIN": SPLIT_TOKENS_MIN}
    constants |= {"BLOCK_G": blocks.num_heads, "BLOCK_D": blocks.num_dims, "BLOCK_N": blocks.num_keys}
    if "SINKS" in features:
        types["sinks_ptr"] = "*fp32"
    else:
        constants["sinks_ptr"] = None
    unaligned = frozenset({"window", "stride_log_sums_row", "stride_log_sums_head", "stride_page_tables_row"})
    what = f"{shape.num_heads} heads on {shape.num_kv_heads} of {shape.head_dim}, page {shape.page_size}"
    what += "" if indices == "i64" else f", indices {indices}"
    label = _label(dtype, features, what)
    kernel = paged_decode_attention_split_kernel
    return CompileCase(label, kernel, types, constants, blocks.config, unaligned, is_hot=dtype.itemsize == 2)


def _reduce_case(architecture: Architecture, dtype: torch.dtype, head_dim: int, features: tuple[str, ...]) -> CompileCase:
    blocks = blocks_of(architecture, HeadShape(1, 1, head_dim, 1), dtype)
    types = {"out_ptr": f"*{TYPE_NAMES[dtype]}", "partials_ptr": "*fp32", "log_sums_ptr": "*fp32", "lengths_ptr": "*i64"}
    types |= {"window": "i32"}
    types |= _strides("out_row", "out_head", "partials_row", "partials_head", "partials_split", "log_sums_row", "log_sums_head")
    constants: dict[str, object] = {f"HAS_{each}": each in features for each in ("WINDOW", "SINKS")}
    constants |= {"HEAD_DIM": head_dim, "MAX_SPLITS": MAX_SPLITS, "SPLIT_TOKENS_MIN": SPLIT_TOKENS_MIN}
    constants |= {"BLOCK_D": blocks.num_dims, "BLOCK_N": blocks.num_keys}
    if "SINKS" in features:
        types["sinks_ptr"] = "*fp32"
    else:
        constants["sinks_ptr"] = None
    unaligned = frozenset({"window", "stride_log_sums_row", "stride_log_sums_head"})
    label = _label(dtype, features, f"head {head_dim}")
    return CompileCase(label, paged_decode_attention_reduce_kernel, types, constants, REDUCE_CONFIG, unaligned, is_hot=True)
