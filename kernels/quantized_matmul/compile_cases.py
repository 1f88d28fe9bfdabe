"""What is compiled and put on the roofline for products with quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Unit, Workload
from kernels.architecture import Architecture
from kernels.quantized_matmul import kernel
from kernels.quantized_matmul.launch import (
    QUANTIZE,
    QUANTIZE_FP8_TOKENS,
    Tiles,
    fp8_tiles_of,
    int8_tiles_of,
    quantize_int8_constants,
    w4_tiles_of,
)
from kernels.quantized_matmul.reference import Layout

COUNTS = frozenset({"num_tokens", "zero_offset", "stride_x_scale_token", "stride_x_scale_group", "stride_weight_scale_row"})


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Both layouts of 4-bit weights in decode's and prefill's tiles, int8 and FP8, and what quantises activations."""
    for layout in ("awq", "gptq"):
        yield _w4(architecture, torch.bfloat16, layout, 128, is_hot=True)
        yield _w4(architecture, torch.float16, layout, 128)
        yield _w4(architecture, torch.bfloat16, layout, 32)
        yield _w4(architecture, torch.bfloat16, layout, 128, is_prefill=True)
    yield _w4(architecture, torch.bfloat16, "gptq", 128, has_group_index=True)
    yield _w4(architecture, torch.bfloat16, "gptq", 128, has_zeros=False)
    yield _w4(architecture, torch.float32, "awq", 128)
    for dtype in (torch.bfloat16, torch.float16):
        yield _eight_bits("int8", int8_tiles_of(architecture), dtype, is_hot=dtype == torch.bfloat16)
        yield _eight_bits("fp8", fp8_tiles_of(architecture), dtype, is_hot=dtype == torch.bfloat16)
    yield from _quantize()


def workloads() -> Iterator[Workload]:
    """One matrix of 8192 inputs and outputs, decode and prefill: weights with scales once, activations in and out."""
    size = 8192
    forms: tuple[tuple[str, int, int, Unit], ...] = (
        ("W4A16, groups of 128", size * size // 2 + size * size // 128 * 5 // 2, 2, "fp16"),
        ("W8A8 int8", size * size + 4 * size, 1, "int8"),
        ("FP8, blocks of 128", size * size + 4 * (size // 128) ** 2, 1, "fp8"),
    )
    for name, weight_bytes, activation_bytes, unit in forms:
        for num_tokens in (1, 64, 4096):
            num_bytes = weight_bytes + num_tokens * size * (activation_bytes + 2)
            yield Workload(f"{name}, {num_tokens} tokens", num_bytes, 2 * num_tokens * size * size, unit)


def _integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def _w4(
    architecture: Architecture,
    dtype: torch.dtype,
    layout: Layout,
    block_k_max: int,
    *,
    is_prefill: bool = False,
    has_group_index: bool = False,
    has_zeros: bool = True,
    is_hot: bool = False,
) -> CompileCase:
    tiles = w4_tiles_of(architecture, dtype, block_k_max, is_prefill=is_prefill)
    pointer = "*" + TYPE_NAMES[dtype]
    types = {"x_ptr": pointer, "qweight_ptr": "*i32", "scales_ptr": pointer, "out_ptr": pointer}
    types |= _integers("num_tokens num_outputs num_inputs group_size zero_offset stride_x_token stride_qweight_row")
    types |= _integers("stride_scales_group stride_qzeros_group stride_out_token")
    constants: dict[str, Any] = tiles.constants() | {
        "IS_AWQ": layout == "awq",
        "HAS_ZEROS": has_zeros,
        "HAS_GROUP_INDEX": has_group_index,
        "HAS_BIAS": False,
        "bias_ptr": None,
    }
    for name, is_there in (("qzeros_ptr", has_zeros), ("group_index_ptr", has_group_index)):
        if is_there:
            types[name] = "*i32"
        else:
            constants[name] = None
    label = f"{TYPE_NAMES[dtype]}, {layout}, steps of {tiles.block_k}"
    label += ", prefill" if is_prefill else ""
    label += ", group index" if has_group_index else ""
    label += "" if has_zeros else ", symmetric"
    return CompileCase(label, kernel.quantized_matmul_w4a16_kernel, types, constants, tiles.config, unaligned=COUNTS, is_hot=is_hot)


def _eight_bits(form: str, tiles: Tiles, dtype: torch.dtype, *, is_hot: bool) -> CompileCase:
    element = "*i8" if form == "int8" else "*fp8e4nv" if tiles.is_native else "*u8"
    types = {"x_ptr": element, "weight_ptr": element, "x_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32"}
    types["out_ptr"] = "*" + TYPE_NAMES[dtype]
    types |= _integers("num_tokens num_outputs num_inputs stride_x_token stride_weight_row stride_out_token")
    constants = tiles.constants() | {"HAS_BIAS": False, "bias_ptr": None}
    function, label = kernel.quantized_matmul_int8_kernel, f"to {TYPE_NAMES[dtype]}"
    if form == "fp8":
        function = kernel.quantized_matmul_fp8_kernel
        types |= _integers("stride_x_scale_token stride_x_scale_group stride_weight_scale_row")
        constants["IS_NATIVE"] = tiles.is_native
        label += "" if tiles.is_native else ", decoded"
    return CompileCase(label, function, types, constants, tiles.config, unaligned=COUNTS, is_hot=is_hot)


def _quantize() -> Iterator[CompileCase]:
    types = {"x_ptr": "*bf16", "out_ptr": "*i8", "scale_ptr": "*fp32"} | _integers("num_inputs stride_x_token stride_out_token")
    for num_inputs in (2048, 8192):
        yield CompileCase(
            f"bf16, {num_inputs} inputs",
            kernel.quantized_matmul_quantize_int8_kernel,
            types,
            quantize_int8_constants(num_inputs),
            QUANTIZE,
            is_hot=num_inputs == 8192,
        )
    types = types | {"out_ptr": "*u8"} | _integers("num_tokens stride_scale_token stride_scale_group")
    yield CompileCase(
        "bf16",
        kernel.quantized_matmul_quantize_fp8_kernel,
        types,
        {"BLOCK_TOKENS": QUANTIZE_FP8_TOKENS},
        QUANTIZE,
        unaligned=frozenset({"num_tokens", "stride_scale_token", "stride_scale_group"}),
        is_hot=True,
    )
