"""What sampling takes beside the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of the rows, `[num_rows]` each.

    Attributes:
        temperature: float32; 0 takes the largest logit.
        top_k: int32; keep the k likeliest, 0 keeps all.
        top_p: float32 above 0; keep the fewest likeliest whose share reaches it, 1 keeps all.
        min_p: float32; keep what is at least so likely as a part of the likeliest, 0 keeps all.
        seeds: int64, the bits of an unsigned 64-bit seed.
        positions: int64, index of the token to be drawn in its whole sequence.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Penalties and biases, as a list of entries a row: each token once at most in a row's list.

    Attributes:
        starts: int32 or int64 `[num_rows + 1]`, where each row's entries begin, and where the last one's end.
        max_entries: No row has more entries; it decides the grid.
        tokens: int32 or int64 `[num_entries]`.
        output_counts: int32 `[num_entries]`, how often the row's output holds the token.
        is_seen: bool `[num_entries]`, whether prompt or output hold it.
        biases: float32 `[num_entries]`, added to the token's logit.
        repetition: float32 `[num_rows]` above 0; a seen token's logit is divided by it, multiplied where it is negative. 1 is none.
        frequency: float32 `[num_rows]`, subtracted for each time that the output holds the token.
        presence: float32 `[num_rows]`, subtracted once for a token that the output holds.
    """

    starts: torch.Tensor
    max_entries: int
    tokens: torch.Tensor
    output_counts: torch.Tensor
    is_seen: torch.Tensor
    biases: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
