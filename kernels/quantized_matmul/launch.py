"""Host side of `quantized_matmul`: checks, tiles, launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, get_args

import torch

from kernels.architecture import Architecture, architecture_of
from kernels.launching import FLOAT_TYPES, Arguments, Launch, LaunchConfig, next_power_of_2, planned
from kernels.quantized_matmul.kernel import (
    quantized_matmul_fp8_kernel,
    quantized_matmul_int8_kernel,
    quantized_matmul_quantize_fp8_kernel,
    quantized_matmul_quantize_int8_kernel,
    quantized_matmul_w4a16_kernel,
    quantized_matmul_w8a16_kernel,
)
from kernels.quantized_matmul.reference import FP8_BLOCK, PER_WORD, Layout, W4Weight, W8Weight

GROUP_M: Final = 8
"""Blocks of tokens that walk the weights together."""

INT8_INPUTS_MAX: Final = (2**31 - 1) // 128**2
"""Inputs whose products an int32 can sum up, whatever they are."""

BLOCK_K_MIN: Final = 16
EIGHT_BIT_BLOCK_K_MIN: Final = 32
"""Inputs a step at least: of operands of 16 bits, and of int8 and e4m3fn that the hardware multiplies."""

QUANTIZE: Final = LaunchConfig(num_warps=4)
QUANTIZE_FP8_TOKENS: Final = 16
"""How activations are quantised: tokens a program, in FP8."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a product's tile.

    Attributes:
        block_m: Tokens.
        block_n: Outputs.
        block_k: Inputs a step.
        config: Warps and stages.
        is_native: FP8 alone: whether the hardware multiplies e4m3fn; else it is decoded.
    """

    block_m: int
    block_n: int
    block_k: int
    config: LaunchConfig
    is_native: bool = True

    def constants(self) -> dict[str, Any]:
        """Constants that every product has."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": GROUP_M}

    def grid(self, num_tokens: int, num_outputs: int) -> tuple[int]:
        """Programs of a product."""
        return (-(-num_tokens // self.block_m) * -(-num_outputs // self.block_n),)


def weight_only_tiles_of(architecture: Architecture, dtype: torch.dtype, block_k_max: int, *, is_prefill: bool = False) -> Tiles:
    """Choose the tile of a product with weights of 4 or of 8 bits, whose activations stay as they are.

    Args:
        architecture: Where it runs.
        dtype: Of the activations.
        block_k_max: Inputs a step at most, so that a step lies in one group; see `block_k_max_of`.
        is_prefill: Tiles of many tokens, for which other instructions are used: a token's last bits then depend on which tiles are
            chosen. By default one tile serves every batch.
    """
    stages = 2 if architecture.backend == "hip" else 3
    if dtype == torch.float32:
        return Tiles(16, 64, min(32, block_k_max), LaunchConfig(num_warps=4, num_stages=2))
    if is_prefill:
        return Tiles(64, 128, min(64, block_k_max), LaunchConfig(num_warps=4, num_stages=stages))
    return Tiles(32, 64, min(64, block_k_max), LaunchConfig(num_warps=4, num_stages=stages))


def block_k_max_of(group_size: int, num_inputs: int) -> int:
    """Give the longest step of 16 to 128 inputs that never leaves a group; 0 where there is none."""
    if group_size >= num_inputs:
        return 128
    return min(group_size & -group_size, 128) if group_size % BLOCK_K_MIN == 0 else 0


def int8_tiles_of(architecture: Architecture) -> Tiles:
    """Choose the tile of an int8 product; one for every batch."""
    return Tiles(64, 128, 128, LaunchConfig(num_warps=4, num_stages=2 if architecture.backend == "hip" else 3))


def fp8_tiles_of(architecture: Architecture) -> Tiles:
    """Choose the tile of an FP8 product; one for every batch."""
    if architecture.name in ("sm_80", "gfx942"):
        return Tiles(64, 64, 64, LaunchConfig(num_warps=4, num_stages=2), is_native=False)
    return Tiles(64, 128, 128, LaunchConfig(num_warps=4, num_stages=2 if architecture.backend == "hip" else 3))


def quantize_int8_constants(num_inputs: int) -> dict[str, Any]:
    """Constants of the kernel that quantises to int8."""
    return {"BLOCK": min(next_power_of_2(num_inputs), 4096)}


def matmul_w4a16(
    x: torch.Tensor,
    weight: W4Weight,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Multiply by 4-bit weights; see `reference.matmul_w4a16`.

    Args:
        x: `[num_tokens, num_inputs]`; rows may be strided.
        weight: The weights, on x's device; int32 words, whose rows may be strided.
        bias: `[num_outputs]`.
        out: `[num_tokens, num_outputs]` of x's type. A new tensor by default.
        tiles: By default `weight_only_tiles_of` the device; its `block_k` must divide the groups.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong, or a group has no multiple of 16 inputs.
    """
    out = x.new_empty((x.shape[0], weight.scales.shape[-1])) if out is None else out
    tensors = (x, weight.qweight, weight.scales, weight.qzeros, weight.minimums, weight.group_index, bias, out)
    _plan_w4a16(*tensors, weight.layout, weight.group_size, weight.zero_offset, tiles)(*tensors)
    return out


@planned
def _plan_w4a16(  # noqa: PLR0913 (a tensor each)
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    minimums: torch.Tensor | None,
    group_index: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    layout: Layout,
    group_size: int,
    zero_offset: int,
    tiles: Tiles | None,
) -> Launch:
    """Check the arguments, and plan the launch on the tensors."""
    arguments = Arguments("matmul_w4a16", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
    num_tokens, num_inputs = x.shape
    weight = W4Weight(qweight, scales, layout, group_size, qzeros, group_index, zero_offset, minimums)
    num_outputs = _check_w4(arguments, weight, num_inputs)
    _check_out(arguments, out, bias, num_tokens, num_outputs)
    arguments.require(out.dtype == x.dtype, "out", str(x.dtype), out.dtype)
    # With a group index a step may lie in any groups.
    tiles = _weight_tiles(arguments, x, num_inputs if group_index is not None else group_size, tiles)
    numbers = (
        num_tokens,
        num_outputs,
        num_inputs,
        group_size,
        zero_offset,
        x.stride(0),
        qweight.stride(0),
        scales.stride(0),
        0 if qzeros is None else qzeros.stride(0),
        0 if minimums is None else minimums.stride(0),
        out.stride(0),
    )
    constants = tiles.constants() | {
        "IS_AWQ": layout == "awq",
        "HAS_ZEROS": qzeros is not None,
        "HAS_MINIMUMS": minimums is not None,
        "HAS_GROUP_INDEX": group_index is not None,
        "HAS_BIAS": bias is not None,
    }
    return Launch(quantized_matmul_w4a16_kernel, tiles.grid(num_tokens, num_outputs), numbers, constants, tiles.config)


def _weight_tiles(arguments: Arguments, x: torch.Tensor, group_size: int, tiles: Tiles | None) -> Tiles:
    """Choose or check the tile of a product whose activations stay as they are."""
    block_k_max = block_k_max_of(group_size, x.shape[1])
    arguments.require(block_k_max > 0, "group_size", f"a multiple of {BLOCK_K_MIN}, or all inputs", group_size)
    tiles = tiles or weight_only_tiles_of(architecture_of(x.device), x.dtype, block_k_max)
    arguments.require(tiles.block_k <= block_k_max, "tiles", f"block_k up to {block_k_max}", tiles.block_k)
    return tiles


def _check_w4(arguments: Arguments, weight: W4Weight, num_inputs: int) -> int:
    """Check 4-bit weights; gives the number of outputs."""
    layouts = get_args(Layout)
    arguments.require(weight.layout in layouts, "layout", " or ".join(layouts), weight.layout)
    arguments.require(weight.scales.dim() == 2, "scales", "2 dimensions", weight.scales.dim())
    num_groups, num_outputs = weight.scales.shape
    arguments.tensor("scales", weight.scales, shape=(None, None), dtypes=FLOAT_TYPES)
    arguments.require(num_outputs > 0 and num_outputs % PER_WORD == 0, "scales", "a multiple of 8 outputs", num_outputs)
    arguments.require(num_inputs > 0 and num_inputs % PER_WORD == 0, "x", "a multiple of 8 inputs", num_inputs)
    arguments.require(weight.group_size > 0, "group_size", "positive", weight.group_size)
    arguments.require(weight.zero_offset in (0, 1), "zero_offset", "0 or 1", weight.zero_offset)
    shape = (num_inputs // PER_WORD, num_outputs) if weight.layout == "gptq" else (num_inputs, num_outputs // PER_WORD)
    arguments.tensor("qweight", weight.qweight, shape=shape, dtypes=(torch.int32,))
    if weight.group_index is None:
        wanted = -(-num_inputs // weight.group_size)
        arguments.require(num_groups == wanted, "scales", f"{wanted} groups of {weight.group_size}", num_groups)
    else:
        arguments.tensor("group_index", weight.group_index, shape=(num_inputs,), dtypes=(torch.int32,))
    if weight.minimums is not None:
        is_alone = weight.qzeros is None and weight.group_index is None
        arguments.require(is_alone, "minimums", "None beside zero points or a group index", "both")
        arguments.tensor("minimums", weight.minimums, shape=(num_groups, num_outputs), dtypes=FLOAT_TYPES)
    if weight.qzeros is not None:
        arguments.tensor("qzeros", weight.qzeros, shape=(num_groups, num_outputs // PER_WORD), dtypes=(torch.int32,))
    return num_outputs


def matmul_w8a16(
    x: torch.Tensor,
    weight: W8Weight,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Multiply by weights of a byte each; see `reference.matmul_w8a16`.

    Args:
        x: `[num_tokens, num_inputs]`; rows may be strided.
        weight: The weights, on x's device; rows may be strided.
        bias: `[num_outputs]`.
        out: `[num_tokens, num_outputs]` of x's type. A new tensor by default.
        tiles: By default `weight_only_tiles_of` the device; its `block_k` must divide the groups.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong, or a group has no multiple of 16 inputs.
    """
    out = x.new_empty((x.shape[0], weight.codes.shape[0])) if out is None else out
    tensors = (x, weight.codes, weight.scales, weight.minimums, bias, out)
    _plan_w8a16(*tensors, weight.group_size, weight.zero, weight.is_float8, tiles)(*tensors)
    return out


@planned
def _plan_w8a16(  # noqa: PLR0913 (a tensor each)
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    minimums: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group_size: int,
    zero: int,
    is_float8: bool,
    tiles: Tiles | None,
) -> Launch:
    """Check the arguments, and plan the launch on the tensors."""
    arguments = Arguments("matmul_w8a16", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
    num_tokens, num_inputs = x.shape
    arguments.require(num_inputs > 0, "x", "at least 1 input", num_inputs)
    arguments.tensor("codes", codes, shape=(None, num_inputs), dtypes=(torch.uint8,))
    arguments.require(group_size > 0, "group_size", "positive", group_size)
    num_outputs = codes.shape[0]
    shape = (-(-num_inputs // group_size), num_outputs)
    arguments.tensor("scales", scales, shape=shape, dtypes=FLOAT_TYPES)
    arguments.require(0 <= zero <= 255, "zero", "0 to 255", zero)
    if is_float8 or minimums is not None:
        arguments.require(zero == 0, "zero", "0 for e4m3fn and beside minimums", zero)
    if minimums is not None:
        arguments.require(not is_float8, "minimums", "None for e4m3fn", "a tensor")
        arguments.tensor("minimums", minimums, shape=shape, dtypes=FLOAT_TYPES)
    _check_out(arguments, out, bias, num_tokens, num_outputs)
    arguments.require(out.dtype == x.dtype, "out", str(x.dtype), out.dtype)
    tiles = _weight_tiles(arguments, x, group_size, tiles)
    numbers = (
        num_tokens,
        num_outputs,
        num_inputs,
        group_size,
        zero,
        x.stride(0),
        codes.stride(0),
        scales.stride(0),
        0 if minimums is None else minimums.stride(0),
        out.stride(0),
    )
    flags = {"IS_FLOAT8": is_float8, "HAS_MINIMUMS": minimums is not None, "HAS_BIAS": bias is not None}
    constants = tiles.constants() | flags
    return Launch(quantized_matmul_w8a16_kernel, tiles.grid(num_tokens, num_outputs), numbers, constants, tiles.config)


def _check_out(arguments: Arguments, out: torch.Tensor, bias: torch.Tensor | None, num_tokens: int, num_outputs: int) -> None:
    if bias is not None:
        arguments.tensor("bias", bias, shape=(num_outputs,), dtypes=FLOAT_TYPES)
    arguments.tensor("out", out, shape=(num_tokens, num_outputs), dtypes=FLOAT_TYPES)


def matmul_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Multiply int8 by int8; see `reference.matmul_int8`.

    Args:
        x: int8 `[num_tokens, num_inputs]`; rows may be strided.
        x_scale: float32 `[num_tokens]`.
        weight: int8 `[num_outputs, num_inputs]`; rows may be strided.
        weight_scale: float32 `[num_outputs]`.
        out: `[num_tokens, num_outputs]`, floating-point.
        bias: `[num_outputs]`.
        tiles: By default `int8_tiles_of` the device; `block_k` is at least 32.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    tensors = (x, x_scale, weight, weight_scale, bias, out)
    _plan_int8(*tensors, tiles)(*tensors)
    return out


@planned
def _plan_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: Tiles | None,
) -> Launch:
    """Check the arguments, and plan the launch on the tensors."""
    arguments = Arguments("matmul_int8", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=(torch.int8,))
    num_tokens, num_inputs = x.shape
    arguments.require(1 <= num_inputs <= INT8_INPUTS_MAX, "x", f"1 to {INT8_INPUTS_MAX} inputs", num_inputs)
    arguments.tensor("weight", weight, shape=(None, num_inputs), dtypes=(torch.int8,))
    num_outputs = weight.shape[0]
    arguments.tensor("x_scale", x_scale, shape=(num_tokens,), dtypes=(torch.float32,))
    arguments.tensor("weight_scale", weight_scale, shape=(num_outputs,), dtypes=(torch.float32,))
    _check_out(arguments, out, bias, num_tokens, num_outputs)
    tiles = tiles or int8_tiles_of(architecture_of(x.device))
    arguments.require(tiles.block_k >= EIGHT_BIT_BLOCK_K_MIN, "tiles", f"block_k from {EIGHT_BIT_BLOCK_K_MIN}", tiles.block_k)
    numbers = (num_tokens, num_outputs, num_inputs, x.stride(0), weight.stride(0), out.stride(0))
    constants = tiles.constants() | {"HAS_BIAS": bias is not None}
    return Launch(quantized_matmul_int8_kernel, tiles.grid(num_tokens, num_outputs), numbers, constants, tiles.config)


def matmul_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Multiply FP8 by FP8, scaled by blocks of 128; see `reference.matmul_fp8`.

    Args:
        x: float8_e4m3fn `[num_tokens, num_inputs]`; rows may be strided.
        x_scale: float32 `[num_tokens, ceil(num_inputs / 128)]`, of any strides.
        weight: float8_e4m3fn `[num_outputs, num_inputs]`; rows may be strided.
        weight_scale: float32 `[ceil(num_outputs / 128), ceil(num_inputs / 128)]`.
        out: `[num_tokens, num_outputs]`, floating-point.
        bias: `[num_outputs]`.
        tiles: By default `fp8_tiles_of` the device; `block_n` and `block_k` must divide 128.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    tiles = tiles or fp8_tiles_of(architecture_of(x.device))
    launch = _plan_fp8(x, x_scale, weight, weight_scale, bias, out, tiles)
    if tiles.is_native:
        launch(x, x_scale, weight, weight_scale, bias, out)
    else:
        launch(x.view(torch.uint8), x_scale, weight.view(torch.uint8), weight_scale, bias, out)
    return out


@planned
def _plan_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: Tiles,
) -> Launch:
    """Check the arguments, and plan the launch on the tensors."""
    arguments = Arguments("matmul_fp8", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=(torch.float8_e4m3fn,))
    num_tokens, num_inputs = x.shape
    arguments.require(num_inputs > 0, "x", "at least 1 input", num_inputs)
    arguments.tensor("weight", weight, shape=(None, num_inputs), dtypes=(torch.float8_e4m3fn,))
    num_outputs, num_groups = weight.shape[0], -(-num_inputs // FP8_BLOCK)
    arguments.tensor("x_scale", x_scale, shape=(num_tokens, num_groups), dtypes=(torch.float32,), is_dense_last=False)
    shape = (-(-num_outputs // FP8_BLOCK), num_groups)
    arguments.tensor("weight_scale", weight_scale, shape=shape, dtypes=(torch.float32,))
    _check_out(arguments, out, bias, num_tokens, num_outputs)
    does_divide = FP8_BLOCK % tiles.block_n == 0 and FP8_BLOCK % tiles.block_k == 0
    arguments.require(does_divide, "tiles", "block_n and block_k that divide 128", (tiles.block_n, tiles.block_k))
    block_k_min = EIGHT_BIT_BLOCK_K_MIN if tiles.is_native else BLOCK_K_MIN
    arguments.require(tiles.block_k >= block_k_min, "tiles", f"block_k from {block_k_min}", tiles.block_k)
    numbers = (
        num_tokens,
        num_outputs,
        num_inputs,
        x.stride(0),
        x_scale.stride(0),
        x_scale.stride(1),
        weight.stride(0),
        weight_scale.stride(0),
        out.stride(0),
    )
    constants = tiles.constants() | {"IS_NATIVE": tiles.is_native, "HAS_BIAS": bias is not None}
    return Launch(quantized_matmul_fp8_kernel, tiles.grid(num_tokens, num_outputs), numbers, constants, tiles.config)


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations to int8, a scale a token; see `reference.quantize_int8`.

    Args:
        x: `[num_tokens, num_inputs]`; rows may be strided.

    Returns:
        int8 as `x`, and scales float32 `[num_tokens]`.

    Raises:
        KernelArgumentError: A shape, type or stride is wrong.
    """
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    _plan_quantize_int8(x)(x, out, scale)
    return out, scale


@planned
def _plan_quantize_int8(x: torch.Tensor) -> Launch:
    """Check `x`, and plan the launch on it, contiguous codes, and scales."""
    arguments = Arguments("quantize_int8", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
    num_tokens, num_inputs = x.shape
    arguments.require(num_inputs > 0, "x", "at least 1 input", num_inputs)
    numbers, constants = (num_inputs, x.stride(0), num_inputs), quantize_int8_constants(num_inputs)
    return Launch(quantized_matmul_quantize_int8_kernel, (num_tokens,), numbers, constants, QUANTIZE)


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations to FP8, a scale for every 128 inputs of a token; see `reference.quantize_fp8`.

    Args:
        x: `[num_tokens, num_inputs]`; rows may be strided.

    Returns:
        float8_e4m3fn as `x`, and scales float32 `[num_tokens, ceil(num_inputs / 128)]`.

    Raises:
        KernelArgumentError: A shape, type or stride is wrong.
    """
    num_groups = -(-x.shape[-1] // FP8_BLOCK)
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    _plan_quantize_fp8(x)(x, out, scale)
    return out.view(torch.float8_e4m3fn), scale


@planned
def _plan_quantize_fp8(x: torch.Tensor) -> Launch:
    """Check `x`, and plan the launch on it, contiguous codes, and contiguous scales."""
    arguments = Arguments("quantize_fp8", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
    num_tokens, num_inputs = x.shape
    arguments.require(num_inputs > 0, "x", "at least 1 input", num_inputs)
    num_groups = -(-num_inputs // FP8_BLOCK)
    numbers = (num_tokens, num_inputs, x.stride(0), num_inputs, num_groups, 1)
    grid = (-(-num_tokens // QUANTIZE_FP8_TOKENS), num_groups)
    constants = {"BLOCK_TOKENS": QUANTIZE_FP8_TOKENS}
    return Launch(quantized_matmul_quantize_fp8_kernel, grid, numbers, constants, QUANTIZE)
