"""Mixture-of-experts layers in torch: tokens are grouped by expert, and each expert computes its group at once.

Which experts a token goes through depends on the token alone, and its experts' outputs are added up in the order of their numbers,
so neighbours change nothing but the number of rows of an expert's products (see `linear.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from services.worker.layers.ops import ClampedSwiglu, MixtureSpec


def clamped_swiglu(spec: ClampedSwiglu, gate_up: torch.Tensor) -> torch.Tensor:
    """See `ClampedSwiglu`; the gate is the first half of each row."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    return gate * torch.sigmoid(gate * spec.alpha) * (up + 1)


def mix(x: torch.Tensor, spec: MixtureSpec, gate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Compute a mixture layer.

    Args:
        x: `[num_tokens, hidden_size]`.
        spec: The layer; its experts are sequences of `Linear`.
        gate: Makes an expert's inner values of its gate and up projections.

    Returns:
        `[num_tokens, hidden_size]`; experts' outputs are added up in float32.
    """
    experts, weights = _route(spec.router(x).float(), spec)
    pairs = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=len(spec.down)).tolist()
    tokens, flat_weights = pairs // spec.top_k, weights.flatten()
    mixed = torch.zeros(x.shape, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        group = tokens[start : start + count]
        given = spec.down[expert](gate(spec.gate_up[expert](x.index_select(0, group))))
        mixed.index_add_(0, group, given.float() * flat_weights[pairs[start : start + count], None])
        start += count
    return mixed.to(x.dtype)


def _route(scores: torch.Tensor, spec: MixtureSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by their scores `[num_tokens, num_experts]`: numbers and weights, each `[num_tokens, top_k]`."""
    if spec.is_normalized:
        chosen, experts = scores.topk(spec.top_k, dim=-1)
        return experts, chosen.softmax(dim=-1)
    weights, experts = scores.softmax(dim=-1).topk(spec.top_k, dim=-1)
    return experts, weights
