"""The definition of `quantized_matmul` in plain torch: layouts of quantised weights, what they stand for, and the products.

Four forms: W4A16, 4-bit weights in groups along the inputs, laid out as GPTQ or AWQ checkpoints are; W8A16, the same with a byte a
weight, which is an integer or e4m3fn; W8A8, int8 by int8 with a scale a token and a scale an output; FP8 (e4m3fn) by FP8 with a
scale for every 128 inputs of a token and every 128 x 128 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["gptq", "awq"]

PER_WORD = 8
"""4-bit numbers in one int32."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs stands in the first, second … four bits of AWQ's word, lowest bits first."""

GPTQ_ORDER = tuple(range(PER_WORD))
"""GPTQ packs in order."""

FP8_BLOCK = 128
"""Side of a block of FP8 weights, and length of a group of FP8 activations."""

FP8_MAX = 448.0
INT8_MAX = 127.0

ABSOLUTE_MIN = 1e-10
"""What the largest magnitude of a group counts as at least, so that a group of zeros has a scale."""


def pack_words(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Pack numbers 0 … 15, `[..., 8 n]`, into int32 `[..., n]`; `order[i]` is which of the eight stands in bits 4 i … 4 i + 3."""
    grouped = values.to(torch.int64).unflatten(-1, (-1, PER_WORD))[..., list(order)]
    words = (grouped << (4 * torch.arange(PER_WORD))).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_words(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Undo `pack_words`: int32 `[..., n]` to int32 `[..., 8 n]`."""
    nibbles = (words[..., None] >> (4 * torch.arange(PER_WORD))) & 15
    values = torch.empty_like(nibbles)
    values[..., list(order)] = nibbles
    return values.flatten(-2)


def pack_w4(
    values: torch.Tensor, zeros: torch.Tensor, layout: Layout, *, zero_offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay 4-bit weights out as a checkpoint does.

    Args:
        values: `[num_inputs, num_outputs]`, 0 … 15.
        zeros: `[num_groups, num_outputs]`, 0 … 15.
        layout: GPTQ packs values along the inputs, AWQ along the outputs in an order of its own; both pack zeros along the outputs.
        zero_offset: What a stored zero point lacks of the true one, modulo 16: 1 in GPTQ checkpoints of version 1, else 0.

    Returns:
        `qweight`, int32 `[num_inputs / 8, num_outputs]` (GPTQ) or `[num_inputs, num_outputs / 8]` (AWQ), and `qzeros`, int32
        `[num_groups, num_outputs / 8]`.
    """
    stored = (zeros - zero_offset) & 15
    if layout == "gptq":
        return pack_words(values.T, GPTQ_ORDER).T.contiguous(), pack_words(stored, GPTQ_ORDER)
    return pack_words(values, AWQ_ORDER), pack_words(stored, AWQ_ORDER)


@dataclass(frozen=True, slots=True)
class W4Weight:
    """A matrix of 4-bit weights.

    Attributes:
        qweight: See `pack_w4`.
        scales: `[num_groups, num_outputs]`.
        layout: See `pack_w4`.
        group_size: Inputs of a group; input k belongs to group `k // group_size` …
        qzeros: See `pack_w4`; without them every zero point is 8.
        group_index: … or, where this int32 `[num_inputs]` is given (GPTQ's `g_idx`), to group `group_index[k]`.
        zero_offset: See `pack_w4`.
        minimums: `[num_groups, num_outputs]`: what code 0 stands for. With them there are neither zero points nor a group index.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    layout: Layout
    group_size: int
    qzeros: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    zero_offset: int = 0
    minimums: torch.Tensor | None = None


def dequantize_w4(weight: W4Weight) -> torch.Tensor:
    """Compute `(value - zero) * scale`, or `value * scale + minimum`, float32 `[num_inputs, num_outputs]`."""
    is_gptq = weight.layout == "gptq"
    values = unpack_words(weight.qweight.T, GPTQ_ORDER).T if is_gptq else unpack_words(weight.qweight, AWQ_ORDER)
    zeros = torch.full(weight.scales.shape, 8)
    if weight.qzeros is not None:
        stored = unpack_words(weight.qzeros, GPTQ_ORDER if is_gptq else AWQ_ORDER)
        zeros = (stored + weight.zero_offset) & 15
    index = weight.group_index
    group = torch.arange(values.shape[0]) // weight.group_size if index is None else index.long()
    if weight.minimums is not None:
        return values.float() * weight.scales[group].float() + weight.minimums[group].float()
    return (values - zeros[group]).float() * weight.scales[group].float()


@dataclass(frozen=True, slots=True)
class W8Weight:
    """A matrix of weights of a byte each, in groups along the inputs.

    Attributes:
        codes: uint8 `[num_outputs, num_inputs]`: 0 … 255, or e4m3fn bit by bit.
        scales: `[num_groups, num_outputs]`.
        group_size: Inputs of a group; input k belongs to group `k // group_size`.
        zero: The code that stands for zero; of integers without minimums alone.
        minimums: As `scales`: what code 0 stands for.
        is_float8: Whether codes are e4m3fn.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    zero: int = 0
    minimums: torch.Tensor | None = None
    is_float8: bool = False


def dequantize_w8(weight: W8Weight) -> torch.Tensor:
    """Compute `(code - zero) * scale`, or `code * scale + minimum`, float32 `[num_inputs, num_outputs]`."""
    group = torch.arange(weight.codes.shape[1]) // weight.group_size
    values = weight.codes.view(torch.float8_e4m3fn).float() if weight.is_float8 else weight.codes.float() - weight.zero
    scaled = values.T * weight.scales[group].float()
    return scaled if weight.minimums is None else scaled + weight.minimums[group].float()


def matmul_w8a16(x: torch.Tensor, weight: W8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply `x [num_tokens, num_inputs]` by the dequantised weights; float32 `[num_tokens, num_outputs]`."""
    out = x.float() @ dequantize_w8(weight)
    return out if bias is None else out + bias.float()


def matmul_w4a16(x: torch.Tensor, weight: W4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply `x [num_tokens, num_inputs]` by the dequantised weights; float32 `[num_tokens, num_outputs]`."""
    out = x.float() @ dequantize_w4(weight)
    return out if bias is None else out + bias.float()


def _quotient(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide and round once. By a plain number torch divides so on a CPU; on a GPU it multiplies by the rounded inverse."""
    return x / torch.full_like(x, divisor)


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row: `scale = max|row| / 127`, `q = round(row / scale)`, ties to even.

    Returns:
        int8 as `x`, and scales float32 `[num_rows]`.
    """
    scale = _quotient(x.float().abs().amax(dim=-1).clamp_min(ABSOLUTE_MIN), INT8_MAX)
    return (x.float() / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def matmul_int8(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply int8 by int8.

    Args:
        x: int8 `[num_tokens, num_inputs]`.
        x_scale: float32 `[num_tokens]`.
        weight: int8 `[num_outputs, num_inputs]`.
        weight_scale: float32 `[num_outputs]`.
        bias: `[num_outputs]`.

    Returns:
        float32 `[num_tokens, num_outputs]`; the sum itself is exact.
    """
    # float64 holds every such sum, and a GPU has no products of integers.
    exact = (x.double() @ weight.double().T).float()
    out = exact * x_scale[:, None] * weight_scale[None, :]
    return out if bias is None else out + bias.float()


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row in groups of 128: `scale = max|group| / 448`, `q = x / scale` rounded to e4m3fn, ties to even.

    Returns:
        float8_e4m3fn as `x`, and scales float32 `[num_rows, ceil(num_inputs / 128)]`; the last group may be short.
    """
    num_inputs = x.shape[1]
    padded = torch.nn.functional.pad(x.float(), (0, -num_inputs % FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))
    scale = _quotient(padded.abs().amax(dim=-1).clamp_min(ABSOLUTE_MIN), FP8_MAX)
    scaled = (padded / scale[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).flatten(1)[:, :num_inputs].contiguous(), scale


def matmul_fp8(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply FP8 by FP8, scaled by blocks.

    Args:
        x: float8_e4m3fn `[num_tokens, num_inputs]`.
        x_scale: float32 `[num_tokens, ceil(num_inputs / 128)]`.
        weight: float8_e4m3fn `[num_outputs, num_inputs]`.
        weight_scale: float32 `[ceil(num_outputs / 128), ceil(num_inputs / 128)]`.
        bias: `[num_outputs]`.

    Returns:
        float32 `[num_tokens, num_outputs]`.
    """
    num_outputs, num_inputs = weight.shape
    columns = torch.arange(num_inputs) // FP8_BLOCK
    rows = torch.arange(num_outputs) // FP8_BLOCK
    out = (x.float() * x_scale[:, columns]) @ (weight.float() * weight_scale[rows][:, columns]).T
    return out if bias is None else out + bias.float()
