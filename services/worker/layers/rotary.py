"""Rotary position embedding: tables of cosines and sines for every position, and their application.

The first half of what is turned of a head turns against the second (the Hugging Face layout). A table row serves queries and keys
alike. How far a position turns is in `rope_scaling.py`.

Source: Su et al., RoFormer (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.errors import ModelError
from headrace.models.model_config import RopeConfig
from services.worker.layers.rope_scaling import RopeLengths, rope_frequencies


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTables:
    """Cosines and sines for positions `0 … max_position - 1`, whatever computes with them.

    Attributes:
        cos: float32 `[max_position, num_pairs]`; value `i` of a head turns against value `i + num_pairs`.
        sin: The same shape. Values from `2 * num_pairs` on are not turned.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_tables(rope: RopeConfig, *, head_dim: int, context: int, max_position: int) -> RotaryTables:
    """Make tables.

    Args:
        rope: What config.json says.
        head_dim: Size of a head, of which `rope.rotary_factor` is turned.
        context: The model's context length by config.json, in tokens.
        max_position: Number of positions, in tokens.

    Raises:
        ModelError: The rope type is not supported, or a parameter is missing or out of range.
    """
    rotary_dim = int(head_dim * rope.rotary_factor)
    if rotary_dim % 2 or rotary_dim < 2:
        raise ModelError(
            f"{rotary_dim} of a head's {head_dim} values are to be turned; rotary embedding turns pairs", param="head_dim"
        )
    frequencies = rope_frequencies(rope, rotary_dim, RopeLengths(context=context, longest=max_position))
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies.inverse)
    factor = frequencies.attention_factor
    return RotaryTables(cos=angles.cos().mul_(factor), sin=angles.sin().mul_(factor))


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
