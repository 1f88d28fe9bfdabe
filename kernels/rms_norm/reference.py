"""Root-mean-square normalisation, in plain torch: the definition.

`y = x / sqrt(mean(x²) + eps) * (weight + weight_offset)` over the last dimension, in float32, rounded once at the end.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019). Gemma's weights are stored less 1: `weight_offset=1`.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """Normalise `x: [..., hidden_size]` with `weight: [hidden_size]`; the type is kept."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + weight_offset)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add first, then normalise the rounded sum.

    Args:
        x: `[num_tokens, hidden_size]`, what a block computed.
        residual: `[num_tokens, hidden_size]`, what it computed it from.
        weight: `[hidden_size]`.
        eps: Added to the mean square.
        weight_offset: Added to every weight.

    Returns:
        The normalised sum, and the sum itself, rounded to the type: the next residual.
    """
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps=eps, weight_offset=weight_offset), total
