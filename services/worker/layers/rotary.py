"""Rotary position embedding: tables of cosines and sines for every position, and their application.

The first half of what is turned of a head turns against the second (the Hugging Face layout). A table row serves queries and keys
alike.

Source: Su et al., RoFormer (2021); linear scaling: Chen et al. (2023); llama3 scaling: Llama 3.1's reference code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from headrace.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTables:
    """Cosines and sines for positions `0 … max_position - 1`, whatever computes with them.

    Attributes:
        cos: float32 `[max_position, num_pairs]`; value `i` of a head turns against value `i + num_pairs`.
        sin: The same shape. Values from `2 * num_pairs` on are not turned.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_tables(rotary_dim: int, *, max_position: int, theta: float, scaling: Mapping[str, Any] | None) -> RotaryTables:
    """Make tables.

    Args:
        rotary_dim: How many values at the start of a head are turned; even.
        max_position: Number of positions, in tokens.
        theta: Base of the frequencies.
        scaling: The model's `rope_scaling` with its `rope_type`, or None for plain rotary embedding.

    Raises:
        ModelError: The rope type is not supported, or a parameter is missing or out of range.
    """
    frequencies = _inverse_frequencies(rotary_dim, theta=theta, scaling=scaling)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    return RotaryTables(cos=angles.cos(), sin=angles.sin())


class Rotary:
    """Rotary embedding in torch.

    The sign of the rotation lies in the sine table, so that applying it is one roll, one product and one fused multiply-add.

    Args:
        tables: Angles are computed in float32 and rounded here.
        dtype: Type of the tables, that of the activations.
    """

    def __init__(self, tables: RotaryTables, dtype: torch.dtype) -> None:
        self._cos = torch.cat((tables.cos, tables.cos), dim=-1).to(dtype)
        self._signed_sin = torch.cat((-tables.sin, tables.sin), dim=-1).to(dtype)
        self._half = tables.cos.shape[-1]

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pick the table rows of a step once, for all layers: two tensors `[num_tokens, 1, rotary_dim]`."""
        return self._cos.index_select(0, positions).unsqueeze(1), self._signed_sin.index_select(0, positions).unsqueeze(1)

    def apply_(self, heads: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Turn `heads: [num_tokens, num_heads, head_dim]` in place; it may be a view into a larger tensor."""
        cos, signed_sin = rows
        turned = heads[..., : 2 * self._half]
        torch.addcmul(turned * cos, turned.roll(self._half, dims=-1), signed_sin, out=turned)


def _inverse_frequencies(head_dim: int, *, theta: float, scaling: Mapping[str, Any] | None) -> torch.Tensor:
    """Give `[head_dim / 2]` float32 radians a position."""
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd; rotary embedding needs an even one", param="head_dim")
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    rope_type = "default" if scaling is None else str(scaling.get("rope_type", "default"))
    scale = ROPE_TYPES.get(rope_type)
    if scale is None:
        raise ModelError(f"rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}", param="rope_scaling")
    return scale(plain, scaling or {})


def _default(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    return frequencies


def _linear(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    return frequencies / _parameter(scaling, "factor")


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, those between are a smooth mix."""
    factor = _parameter(scaling, "factor")
    low, high = _parameter(scaling, "low_freq_factor"), _parameter(scaling, "high_freq_factor")
    if low >= high:
        raise ModelError(f"rope_scaling low_freq_factor {low} is not below high_freq_factor {high}", param="rope_scaling")
    turns = _parameter(scaling, "original_max_position_embeddings") * frequencies / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (share_kept + (1.0 - share_kept) / factor)


def _parameter(scaling: Mapping[str, Any], name: str) -> float:
    value = scaling.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"rope_scaling {name} is {value!r}, not a number above 0", param="rope_scaling")
    return float(value)


ROPE_TYPES: Final[Mapping[str, Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
}
"""Ways to scale the frequencies, by `rope_type`."""
