"""What is compiled and put on the roofline for products with quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

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
    weight_only_tiles_of,
)
from kernels.quantized_matmul.reference import Layout

COUNTS = frozenset({"num_tokens", "zero_offset", "zero", "stride_x_scale_token", "stride_x_scale_group", "stride_weight_scale_row"})


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """4-bit weights in both layouts, in tiles of decode and prefill, bytes, int8 and FP8, and what quantises activations."""
    for layout in ("awq", "gptq"):
        yield _w4(architecture, torch.bfloat16, layout, 128, is_hot=True)
        yield _w4(architecture, torch.float16, layout, 128)
        yield _w4(architecture, torch.bfloat16, layout, 32)
        yield _w4(architecture, torch.bfloat16, layout, 128, variant="prefill")
    yield _w4(architecture, torch.bfloat16, "gptq", 128, variant="group index")
    yield _w4(architecture, torch.bfloat16, "gptq", 128, offsets="none")
    yield _w4(architecture, torch.float32, "awq", 128)
    # GGUF's Q4_1, Q4_K, Q2_K and Q3_K.
    yield _w4(architecture, torch.bfloat16, "gptq", 32, offsets="minimums")
    for block_k in (32, 16):
        yield _w4(architecture, torch.bfloat16, "gptq", block_k, scale_dtype=torch.float32, offsets="minimums")
    yield _w4(architecture, torch.bfloat16, "gptq", 16, scale_dtype=torch.float32)
    yield from _bytes(architecture)
    for dtype in (torch.bfloat16, torch.float16):
        yield _eight_bits("int8", int8_tiles_of(architecture), dtype, is_hot=dtype == torch.bfloat16)
        yield _eight_bits("fp8", fp8_tiles_of(architecture), dtype, is_hot=dtype == torch.bfloat16)
    yield from _quantize()


def _bytes(architecture: Architecture) -> Iterator[CompileCase]:
    """Weights of a byte each, as checkpoints have them: one scale a row, Q8_0, Q6_K, Q5_1, Q5_K, and FP8."""
    half, single = torch.float16, torch.float32
    yield _w8(architecture, torch.bfloat16, 128, half, is_hot=True)
    yield _w8(architecture, torch.float16, 128, half)
    yield _w8(architecture, torch.float32, 128, half)
    yield _w8(architecture, torch.bfloat16, 32, half)
    yield _w8(architecture, torch.bfloat16, 16, single)
    yield _w8(architecture, torch.bfloat16, 32, half, has_minimums=True)
    yield _w8(architecture, torch.bfloat16, 32, single, has_minimums=True)
    yield _w8(architecture, torch.bfloat16, 128, single, is_float8=True, is_hot=True)


def workloads() -> Iterator[Workload]:
    """One matrix of 8192 inputs and outputs, decode and prefill: weights with scales once, activations in and out."""
    size = 8192
    forms: tuple[tuple[str, int, int, Unit], ...] = (
        ("W4A16, groups of 128", size * size // 2 + size * size // 128 * 5 // 2, 2, "fp16"),
        ("W8A16, groups of 32", size * size + size * size // 32 * 2, 2, "fp16"),
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
    scale_dtype: torch.dtype = torch.float16,
    offsets: Literal["zeros", "minimums", "none"] = "zeros",
    variant: Literal["", "prefill", "group index"] = "",
    is_hot: bool = False,
) -> CompileCase:
    tiles = weight_only_tiles_of(architecture, dtype, block_k_max, is_prefill=variant == "prefill")
    pointer, scales = "*" + TYPE_NAMES[dtype], "*" + TYPE_NAMES[scale_dtype]
    types = {"x_ptr": pointer, "qweight_ptr": "*i32", "scales_ptr": scales, "out_ptr": pointer}
    types |= _integers("num_tokens num_outputs num_inputs group_size zero_offset stride_x_token stride_qweight_row")
    types |= _integers("stride_scales_group stride_qzeros_group stride_minimums_group stride_out_token")
    constants: dict[str, Any] = tiles.constants() | {"IS_AWQ": layout == "awq", "HAS_BIAS": False, "bias_ptr": None}
    for name, flag, form, is_there in (
        ("qzeros_ptr", "HAS_ZEROS", "*i32", offsets == "zeros"),
        ("minimums_ptr", "HAS_MINIMUMS", scales, offsets == "minimums"),
        ("group_index_ptr", "HAS_GROUP_INDEX", "*i32", variant == "group index"),
    ):
        constants[flag] = is_there
        if is_there:
            types[name] = form
        else:
            constants[name] = None
    label = f"{TYPE_NAMES[dtype]}, {layout}, steps of {tiles.block_k}"
    label += f", {variant}" if variant else ""
    label += {"zeros": "", "minimums": ", minimums", "none": ", symmetric"}[offsets]
    label += "" if scale_dtype == torch.float16 else f", scales {TYPE_NAMES[scale_dtype]}"
    return CompileCase(label, kernel.quantized_matmul_w4a16_kernel, types, constants, tiles.config, unaligned=COUNTS, is_hot=is_hot)


def _w8(
    architecture: Architecture,
    dtype: torch.dtype,
    block_k_max: int,
    scale_dtype: torch.dtype,
    *,
    has_minimums: bool = False,
    is_float8: bool = False,
    is_hot: bool = False,
) -> CompileCase:
    tiles = weight_only_tiles_of(architecture, dtype, block_k_max)
    pointer, scales = "*" + TYPE_NAMES[dtype], "*" + TYPE_NAMES[scale_dtype]
    types = {"x_ptr": pointer, "codes_ptr": "*u8", "scales_ptr": scales, "out_ptr": pointer}
    types |= _integers("num_tokens num_outputs num_inputs group_size zero stride_x_token stride_codes_row")
    types |= _integers("stride_scales_group stride_minimums_group stride_out_token")
    constants: dict[str, Any] = tiles.constants() | {
        "IS_FLOAT8": is_float8,
        "HAS_MINIMUMS": has_minimums,
        "HAS_BIAS": False,
        "bias_ptr": None,
    }
    if has_minimums:
        types["minimums_ptr"] = scales
    else:
        constants["minimums_ptr"] = None
    label = f"{TYPE_NAMES[dtype]}, {'e4m3fn' if is_float8 else 'integers'}, steps of {tiles.block_k}"
    label += ", minimums" if has_minimums else ""
    label += "" if scale_dtype == torch.float16 else f", scales {TYPE_NAMES[scale_dtype]}"
    return CompileCase(label, kernel.quantized_matmul_w8a16_kernel, types, constants, tiles.config, unaligned=COUNTS, is_hot=is_hot)


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
