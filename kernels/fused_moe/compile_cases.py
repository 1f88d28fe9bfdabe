"""What is compiled and put on the roofline for mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.fused_moe import kernel
from kernels.fused_moe.launch import CHUNK, SMALL, place_constants, product_constants, route_constants, sum_constants, tiles_of

COUNTS = frozenset({"num_tokens", "num_experts", "num_assignments", "num_chunks", "num_blocks_m"})

HOT_EXPERTS = 128
"""The size whose cases stand for all where no spill is allowed: more of them would cost `make test` more than they find."""

MODELS = (("Mixtral", 8, 2, "silu"), ("Qwen3-MoE", 128, 8, "silu"), ("GPT-OSS", 32, 4, "swiglu_clamped"))
"""Name, experts, experts a token, activation. GPT-OSS has biases, and takes turns between gate and up."""


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Every kernel for the three models' forms, and the products in other types."""
    for name, num_experts, top_k, _ in MODELS:
        yield _route(name, num_experts, top_k, is_sigmoid=False)
    yield _route("sigmoid with selection bias, 256 experts", 256, 8, is_sigmoid=True)
    for num_experts in (8, 128, 512):
        yield from _sort(num_experts, tiles_of(architecture, torch.bfloat16)[0].block_m)
    for name, num_experts, top_k, activation in MODELS:
        yield from _products(architecture, torch.bfloat16, name, num_experts, top_k, activation)
    for dtype in (torch.float16, torch.float32):
        yield from _products(architecture, dtype, "Qwen3-MoE", 128, 8, "silu")
    yield from _products(architecture, torch.bfloat16, "gelu", 8, 2, "gelu_tanh")
    for top_k in (2, 8):
        types = {"parts_ptr": "*bf16", "experts_ptr": "*i32", "out_ptr": "*bf16"} | _integers("num_experts hidden stride_out_token")
        constants = sum_constants(4096, top_k)
        yield CompileCase(
            f"bf16, top {top_k}", kernel.fused_moe_sum_kernel, types, constants, SMALL, unaligned=COUNTS, is_hot=top_k == 8
        )


def workloads() -> Iterator[Workload]:
    """One layer, decode and prefill: the chosen experts' weights once, x in and out, three products an assignment."""
    for name, num_experts, top_k, hidden, intermediate in (
        ("Mixtral 8x7B", 8, 2, 4096, 14336),
        ("Qwen3-30B-A3B", 128, 8, 2048, 768),
        ("GPT-OSS 20B", 32, 4, 2880, 2880),
    ):
        for num_tokens in (1, 64, 4096):
            # Experts that some token has, if all are alike.
            num_used = round(num_experts * (1 - (1 - top_k / num_experts) ** num_tokens))
            num_rows = num_tokens * top_k
            weights = num_used * 3 * hidden * intermediate
            num_bytes = 2 * (weights + 2 * num_tokens * hidden)
            label = f"{name} bf16, {num_tokens} tokens, {num_used} of {num_experts} experts"
            yield Workload(label, num_bytes, 2 * 3 * num_rows * hidden * intermediate, "fp16")


def _integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def _route(name: str, num_experts: int, top_k: int, *, is_sigmoid: bool) -> CompileCase:
    types = {"logits_ptr": "*bf16", "weights_ptr": "*fp32", "experts_ptr": "*i32", "scale": "fp32"}
    types |= _integers("num_tokens num_experts stride_logits_token")
    constants = route_constants(num_experts, top_k) | {
        "IS_SIGMOID": is_sigmoid,
        "RENORMALIZE": True,
        "HAS_SELECTION_BIAS": is_sigmoid,
    }
    if is_sigmoid:
        types["selection_bias_ptr"] = "*fp32"
    else:
        constants["selection_bias_ptr"] = None
    return CompileCase(
        name, kernel.fused_moe_route_kernel, types, constants, SMALL, unaligned=COUNTS, is_hot=num_experts == HOT_EXPERTS
    )


def _sort(num_experts: int, block_m: int) -> Iterator[CompileCase]:
    place = place_constants(num_experts, block_m)
    block_experts = place["BLOCK_EXPERTS"]
    sizes = _integers("num_assignments num_experts")
    for function, pointers, integers, constants in (
        (kernel.fused_moe_count_kernel, "experts_ptr counts_ptr", sizes, {"CHUNK": CHUNK, "BLOCK_EXPERTS": block_experts}),
        (
            kernel.fused_moe_place_kernel,
            "counts_ptr before_ptr ends_ptr totals_ptr",
            _integers("num_chunks num_experts"),
            place,
        ),
        (
            kernel.fused_moe_order_kernel,
            "experts_ptr before_ptr ends_ptr totals_ptr order_ptr",
            sizes,
            {"BLOCK_M": block_m, "CHUNK": CHUNK},
        ),
    ):
        types = dict.fromkeys(pointers.split(), "*i32") | integers
        yield CompileCase(
            f"{num_experts} experts", function, types, constants, SMALL, unaligned=COUNTS, is_hot=num_experts == HOT_EXPERTS
        )


def _products(
    architecture: Architecture, dtype: torch.dtype, name: str, num_experts: int, top_k: int, activation: str
) -> Iterator[CompileCase]:
    first, second = tiles_of(architecture, dtype)
    is_biased, is_hot = name == "GPT-OSS", dtype == torch.bfloat16 and num_experts == HOT_EXPERTS
    pointer = "*" + TYPE_NAMES[dtype]
    common: dict[str, str] = {"weight_ptr": pointer, "out_ptr": pointer}
    common |= dict.fromkeys(("order_ptr", "ends_ptr", "totals_ptr"), "*i32")
    common |= _integers("num_blocks_m num_experts hidden intermediate stride_weight_expert stride_weight_row stride_bias_expert")
    biased: dict[str, Any] = {"HAS_BIAS": is_biased}
    if is_biased:
        common["bias_ptr"] = pointer
    else:
        biased["bias_ptr"] = None
    label = f"{TYPE_NAMES[dtype]}, {name}"
    form = {"TOP_K": top_k, "ACTIVATION": activation, "IS_INTERLEAVED": is_biased}
    yield CompileCase(
        label,
        kernel.fused_moe_gate_up_kernel,
        common | {"x_ptr": pointer, "stride_x_token": "i32", "alpha": "fp32", "limit": "fp32"},
        form | biased | product_constants(first, num_experts),
        first.config,
        unaligned=COUNTS,
        is_hot=is_hot,
    )
    yield CompileCase(
        label,
        kernel.fused_moe_down_kernel,
        common | {"activated_ptr": pointer, "router_weights_ptr": "*fp32"},
        biased | product_constants(second, num_experts),
        second.config,
        unaligned=COUNTS,
        is_hot=is_hot,
    )
