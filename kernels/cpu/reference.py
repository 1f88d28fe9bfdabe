"""What the native kernels compute, in numpy: their specification, which tests/native holds every instruction set to.

Results are float64. What the kernels round on purpose is rounded here too (int8 activations, bfloat16 inputs, keys and
values of bfloat16 or 8 bits, bfloat16 attention weights), so what is left between the two is the rounding of float32 sums, and
bounds on it can be tight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

CHUNK_TOKENS: Final = 128
"""Keys attended to in one piece; weights are rounded beside the largest score of their piece."""

GROUP: Final = 32
"""Activations that share a scale."""

SCALE_MIN: Final = np.float32(2.0**-126)
"""A group of activations that a smaller scale would do for is taken for zeros."""

SCALE_MAX: Final = np.float32(2.0**104)
"""A group of activations that needs a larger scale is not finite."""

CODE_RANGE: Final = 253
"""Codes between the ends of a group and 0: of 255 two are for rounding, of the middle and of a number."""

E4M3_MAX: Final = 448.0
"""Largest number of 8-bit pages."""

E4M3_EXPONENT_MIN: Final = -6
"""Below 2 to this power, numbers of 8-bit pages are equally far apart."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


def round_bfloat16(values: npt.NDArray[Any]) -> FloatArray:
    """The nearest bfloat16 of each number, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def round_e4m3(values: npt.NDArray[Any]) -> FloatArray:
    """The nearest number of 8 bits (a sign, 4 bits of exponent, 3 of mantissa), ties to even mantissas.

    What is beyond the largest, 448, becomes that; what is not finite becomes NaN.
    """
    x = np.asarray(values, dtype=np.float64)
    sizes = np.where(np.isfinite(x), np.abs(x), 0.0)
    exponents = np.maximum(np.frexp(sizes)[1] - 1, E4M3_EXPONENT_MIN)
    steps = np.ldexp(1.0, exponents - 3)
    rounded = np.copysign(np.minimum(np.rint(sizes / steps) * steps, E4M3_MAX), x)
    return np.where(np.isfinite(x), rounded, np.nan).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class CodedRows:
    """Activations as products with integer codes see them: `scale * (code + middle)`, in groups of 32, padded with zeros.

    Attributes:
        scales: `[rows, num_groups, 1]`, from 1 to 1.875 by eighths, times powers of 2.
        middles: The same shape, whole numbers.
        codes: `[rows, num_groups, 32]`, -128 to 127.
    """

    scales: DoubleArray
    middles: DoubleArray
    codes: DoubleArray

    def values(self, k: int) -> DoubleArray:
        """What they stand for, `[rows, k]`."""
        values: DoubleArray = (self.scales * (self.codes + self.middles)).reshape(len(self.codes), -1)[:, :k]
        return values


def quantize_rows(x: FloatArray) -> CodedRows:
    """Code activations `[rows, k]`: the scale is the next one up that reaches from one end of a group, or 0, to the other."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // GROUP) * GROUP), np.float32)
    padded[:, :k] = x
    groups = padded.reshape(rows, -1, GROUP)
    low = np.minimum(groups.min(axis=2, keepdims=True), np.float32(0))
    high = np.maximum(groups.max(axis=2, keepdims=True), np.float32(0))
    least = (high - low) * np.float32(1 / CODE_RANGE)
    is_nothing = least < SCALE_MIN
    mantissas, exponents = np.frexp(np.where(is_nothing, np.float32(1), least))
    # frexp gives mantissas from 1/2.
    scales = np.ldexp(np.ceil(mantissas * 16), exponents - 4)
    inverses = np.where(is_nothing, np.float32(0), np.float32(1) / scales)
    middles = np.rint((np.float32(0.5) * low + np.float32(0.5) * high) * inverses)
    codes = np.clip(np.rint(groups * inverses - middles), -128, 127)
    is_number = least <= SCALE_MAX
    return CodedRows(np.where(is_number, scales, np.nan).astype(np.float64), middles.astype(np.float64), codes.astype(np.float64))


def quantize(x: FloatArray) -> DoubleArray:
    """What products with integer codes see of activations `[rows, k]`."""
    return quantize_rows(x).values(x.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class CodedMatrix:
    """A group-quantised matrix.

    Attributes:
        codes: `[n, k]`, unsigned.
        scales: `[n, num_groups]`.
        zero: Code of 0, where there are no minimums.
        minimums: `[n, num_groups]` or None.
        bits: Of a code.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    zero: int
    minimums: npt.NDArray[Any] | None
    bits: int

    def parts(self) -> tuple[DoubleArray, DoubleArray]:
        """What codes and minimums add to each weight, `[n, k]` each."""
        span = self.codes.shape[1] // self.scales.shape[1]
        scales = np.repeat(self.scales.astype(np.float64), span, axis=1)
        if self.minimums is None:
            return scales * (self.codes.astype(np.float64) - self.zero), np.zeros(self.codes.shape)
        return scales * self.codes, np.repeat(self.minimums.astype(np.float64), span, axis=1)

    def weights(self) -> DoubleArray:
        """`scale * (code - zero)`, or `scale * code + minimum`: `[n, k]`."""
        codes, minimums = self.parts()
        return codes + minimums


def multiply_codes(x: FloatArray, matrix: CodedMatrix) -> tuple[DoubleArray, DoubleArray]:
    """The product of activations `[rows, k]` with a matrix, as the kernels round it.

    A weight is `scale * (code - centre + steps) + rest`, an activation `step * (code + middle)`, in pieces of 16 or 32. All but
    the rest is multiplied in whole numbers, of sixteenths of a step where codes have 4 bits; so what steps there are is at most 256
    of these. The rest, at most half of such a unit beyond the steps, is multiplied by the sum of a piece's activations, each
    rounded to bfloat16.

    Returns:
        The products `[rows, n]`, and the sums of the magnitudes of what was added up.
    """
    n, k = matrix.codes.shape
    piece = min(k // matrix.scales.shape[1], GROUP)
    rows, span = quantize_rows(x), k // matrix.scales.shape[1] // piece
    centre, units = 1 << (matrix.bits - 1), np.float32(16 if matrix.bits == 4 else 1)
    scales = np.repeat(matrix.scales.astype(np.float32), span, axis=1)
    steps: FloatArray = np.full_like(scales, centre - matrix.zero)
    rests: FloatArray = np.zeros_like(scales)
    if matrix.minimums is not None:
        minimums = np.repeat(matrix.minimums.astype(np.float64), span, axis=1)
        exact = (scales.astype(np.float64) * centre + minimums).astype(np.float32)
        unit = scales / units
        with np.errstate(over="ignore"):
            quotients = np.divide(exact, unit, out=np.full_like(unit, -256), where=unit != 0)
        whole = np.rint(np.clip(quotients, -256, 256))
        rests = round_bfloat16((exact - whole.astype(np.float64) * unit).astype(np.float32))
        steps = whole / units
    codes = matrix.codes.reshape(n, -1, piece).astype(np.float64) - centre + steps[:, :, None]
    numbers = rows.values(k).reshape(len(x), -1, piece)
    totals = round_bfloat16(numbers.sum(axis=2).astype(np.float32)).astype(np.float64)
    weights = (codes * scales[:, :, None].astype(np.float64)).reshape(n, k)
    seen = numbers.reshape(len(x), k)
    products = seen @ weights.T + totals @ rests.T.astype(np.float64)
    return products, np.abs(seen) @ np.abs(weights.T) + np.abs(totals) @ np.abs(rests.T.astype(np.float64))


def gguf_blocks(dtype_name: str, rows: npt.NDArray[np.uint8]) -> CodedMatrix:
    """Read GGUF blocks `[n, bytes_per_row]` of type q4_0, q4_1 or q8_0. Source: block layouts of ggml (ggml-common.h)."""
    num_halves = 2 if dtype_name == "q4_1" else 1
    size = 2 * num_halves + (32 if dtype_name == "q8_0" else 16)
    blocks = rows.reshape(rows.shape[0], -1, size)
    halves = np.ascontiguousarray(blocks[:, :, : 2 * num_halves]).view(np.float16)
    packed = blocks[:, :, 2 * num_halves :]
    codes: Any = packed ^ 0x80 if dtype_name == "q8_0" else np.concatenate([packed & 15, packed >> 4], axis=2)
    minimums = halves[:, :, 1] if dtype_name == "q4_1" else None
    zero = {"q4_0": 8, "q4_1": 0, "q8_0": 128}[dtype_name]
    return CodedMatrix(codes.reshape(rows.shape[0], -1), halves[:, :, 0], zero, minimums, 8 if dtype_name == "q8_0" else 4)


def norm(x: npt.NDArray[Any], weight: FloatArray, bias: FloatArray | None, *, eps: float, is_layer_norm: bool) -> DoubleArray:
    """RMS norm or layer norm along the last axis."""
    values = x.astype(np.float64)
    if is_layer_norm:
        values = values - values.mean(axis=-1, keepdims=True)
    out: DoubleArray = values / np.sqrt(np.square(values).mean(axis=-1, keepdims=True) + eps) * weight
    return out if bias is None else out + bias


def activate(x: npt.NDArray[Any], name: str) -> DoubleArray:
    """One of the activation functions."""
    x = x.astype(np.float64)
    out: DoubleArray
    if name == "silu":
        out = x / (1 + np.exp(-x))
    elif name == "gelu":
        out = 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    elif name == "gelu_pytorch_tanh":
        out = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    elif name == "relu":
        out = np.maximum(x, 0)
    else:
        raise ValueError(f"activation function {name!r} is not known")
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One attention layer; see `AttentionLayer` of `library.py`.

    Attributes:
        window: Tokens seen, the own one included; 0 for all.
        soft_cap: 0 for none.
        cos: `[positions, num_pairs]`, or None for no rotation; so is `sin`.
        q_norm: `[head_dim]`, or `[num_heads * head_dim]` for all heads together; so is `k_norm`.
        sinks: `[num_heads]`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    norm_eps: float = 1e-6
    cos: FloatArray | None = None
    sin: FloatArray | None = None
    q_norm: FloatArray | None = None
    k_norm: FloatArray | None = None
    sinks: FloatArray | None = None

    @property
    def width(self) -> int:
        """Numbers in a row of queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def attend(
    qkv: FloatArray, layer: Attention, *, round_kv: Callable[[npt.NDArray[Any]], FloatArray] = round_bfloat16
) -> DoubleArray:
    """Outputs of all tokens of one sequence, from its first on.

    Args:
        qkv: `[num_tokens, layer.width]`.
        layer: The layer.
        round_kv: How pages keep keys and values.

    Returns:
        `[num_tokens, num_heads * head_dim]`.
    """
    num_tokens, hd = qkv.shape[0], layer.head_dim
    ends = np.cumsum([layer.num_heads * hd, layer.num_kv_heads * hd])
    queries, keys, values = np.split(qkv, ends, axis=1)
    q = round_bfloat16(_rotate(_norm_heads(queries, layer.q_norm, layer), layer)).astype(np.float64)
    k = round_kv(_rotate(_norm_heads(keys, layer.k_norm, layer), layer)).astype(np.float64)
    v = round_kv(values).reshape(num_tokens, layer.num_kv_heads, hd).astype(np.float64)
    out = np.empty((num_tokens, layer.num_heads, hd))
    for head in range(layer.num_heads):
        kv_head = head // (layer.num_heads // layer.num_kv_heads)
        scores = q[:, head] @ k[:, kv_head].T * layer.scale
        if layer.soft_cap:
            scores = layer.soft_cap * np.tanh(scores / layer.soft_cap)
        sink = None if layer.sinks is None else float(layer.sinks[head])
        for token in range(num_tokens):
            first = max(0, token + 1 - layer.window) if layer.window else 0
            out[token, head] = _attend_row(scores[token], v[:, kv_head], first=first, end=token + 1, sink=sink)
    return out.reshape(num_tokens, -1)


def _attend_row(scores: DoubleArray, values: DoubleArray, *, first: int, end: int, sink: float | None) -> DoubleArray:
    """The weighted mean of `values[first:end]`. Each chunk's weights are rounded beside that chunk's largest score."""
    largest = max(scores[first:end].max(), -math.inf if sink is None else sink)
    total = 0.0 if sink is None else math.exp(sink - largest)
    sums = np.zeros(values.shape[1])
    for start in range(first // CHUNK_TOKENS * CHUNK_TOKENS, end, CHUNK_TOKENS):
        part = slice(max(first, start), min(end, start + CHUNK_TOKENS))
        maximum = scores[part].max()
        weights = round_bfloat16(np.exp(scores[part] - maximum)).astype(np.float64) * math.exp(maximum - largest)
        total += weights.sum()
        sums += weights @ values[part]
    return sums / total


def _norm_heads(x: FloatArray, weight: FloatArray | None, layer: Attention) -> DoubleArray:
    """Norm each head, or all together; gives `[num_tokens, heads, head_dim]`."""
    heads = x.reshape(x.shape[0], -1, layer.head_dim).astype(np.float64)
    if weight is None:
        return heads
    if weight.shape[0] == layer.head_dim:
        return norm(heads, weight, None, eps=layer.norm_eps, is_layer_norm=False)
    return norm(x, weight, None, eps=layer.norm_eps, is_layer_norm=False).reshape(heads.shape)


def _rotate(heads: DoubleArray, layer: Attention) -> DoubleArray:
    """Rotate the first `2 * num_pairs` numbers of each head; number i goes with number `i + num_pairs`."""
    if layer.cos is None or layer.sin is None:
        return heads
    pairs = layer.cos.shape[1]
    cos, sin = (table[: heads.shape[0], None].astype(np.float64) for table in (layer.cos, layer.sin))
    a, b = heads[:, :, :pairs], heads[:, :, pairs : 2 * pairs]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, heads[:, :, 2 * pairs :]], axis=2)
