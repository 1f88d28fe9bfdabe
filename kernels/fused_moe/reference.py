"""The definition of `fused_moe` in plain torch: routing, sorting by expert, and the experts themselves.

Everything is computed in float32; a kernel may round what passes between its steps to the type of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Scoring = Literal["softmax", "sigmoid"]
Activation = Literal["silu", "gelu_tanh", "swiglu_clamped"]

SUM_MIN = 1e-20
"""What a sum of weights counts as at least, where weights are divided by it."""


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    selection_bias: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token, and their weights.

    Experts are ranked by their logits or, with a selection bias, by score plus bias; the bias has no part in the weights. A NaN
    ranks as -inf, and of equals the expert of the lower number comes first.

    Args:
        logits: Of the router, `[num_tokens, num_experts]`.
        top_k: Experts a token.
        scoring: Score of an expert: softmax over all experts, or each one's sigmoid.
        renormalize: Divide the weights by their sum. Softmax renormalised is the softmax over the chosen alone.
        selection_bias: `[num_experts]` float32.
        scale: Factor of all weights, after renormalising.

    Returns:
        Weights `[num_tokens, top_k]` float32 and experts `[num_tokens, top_k]` int32, best first.
    """
    logits = logits.float()
    scores = logits.softmax(dim=-1) if scoring == "softmax" else logits.sigmoid()
    rank = logits if selection_bias is None else scores + selection_bias.float()
    rank = rank.masked_fill(rank.isnan(), -torch.inf)
    experts = rank.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(SUM_MIN)
    return weights * scale, experts.to(torch.int32)


def sort_by_expert(experts: torch.Tensor, num_experts: int, block_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order assignments (token x choice, numbered `token * top_k + choice`) by expert, each expert's rows padded to whole blocks.

    Args:
        experts: `[num_tokens, top_k]`; what is not in `0 … num_experts - 1` is left out.
        num_experts: Experts there are.
        block_rows: Rows of a block.

    Returns:
        The order, int32 `[num_padded_rows]` with -1 in padding; ends of the experts' padded ranges in it, and how many assignments
        each expert has, both int32 `[num_experts]`. Assignments of one expert keep their order.
    """
    flat = experts.flatten()
    order, ends, counts = [], [], []
    for expert in range(num_experts):
        mine = (flat == expert).nonzero().flatten().tolist()
        padding = -len(mine) % block_rows
        order += mine + [-1] * padding
        ends.append(len(order))
        counts.append(len(mine))
    return tuple(torch.tensor(each, dtype=torch.int32) for each in (order, ends, counts))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer.

    Attributes:
        gate_up_weight: `[num_experts, 2 * intermediate, hidden]`; rows of gate first, then those of up.
        down_weight: `[num_experts, hidden, intermediate]`.
        activation: What joins gate and up; see `activate`.
        is_interleaved: Rows of gate and up take turns (GPT-OSS).
        gate_up_bias: `[num_experts, 2 * intermediate]`, laid out as the rows are.
        down_bias: `[num_experts, hidden]`; weighted as the rest of an expert's output.
        alpha: See `activate`.
        limit: See `activate`.
    """

    gate_up_weight: torch.Tensor
    down_weight: torch.Tensor
    activation: Activation = "silu"
    is_interleaved: bool = False
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    alpha: float = 1.702
    limit: float = 7.0


def activate(layer: Experts, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Join the two halves of the first product.

    `silu` and `gelu_tanh`: `f(gate) * up`. `swiglu_clamped` (GPT-OSS): gate is cut off above `limit`, up to `-limit … limit`, and
    the result is `gate * sigmoid(alpha * gate) * (up + 1)`.
    """
    if layer.activation == "silu":
        return F.silu(gate) * up
    if layer.activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=layer.limit)
    return gate * torch.sigmoid(layer.alpha * gate) * (up.clamp(-layer.limit, layer.limit) + 1)


def fused_moe(x: torch.Tensor, layer: Experts, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Sum each token's experts by weight: `out[t] = sum_k weights[t, k] * expert[experts[t, k]](x[t])`.

    Args:
        x: `[num_tokens, hidden]`.
        layer: The experts.
        weights: `[num_tokens, top_k]` float32.
        experts: `[num_tokens, top_k]`; a number that is no expert's (another rank's, or padding: -1) adds nothing.

    Returns:
        `[num_tokens, hidden]` float32.
    """
    out = torch.zeros(x.shape)
    for expert in range(layer.gate_up_weight.shape[0]):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        both = x[token].float() @ layer.gate_up_weight[expert].float().T
        if layer.gate_up_bias is not None:
            both = both + layer.gate_up_bias[expert].float()
        gate, up = (both[:, ::2], both[:, 1::2]) if layer.is_interleaved else both.chunk(2, dim=1)
        result = activate(layer, gate, up) @ layer.down_weight[expert].float().T
        if layer.down_bias is not None:
            result = result + layer.down_bias[expert].float()
        out.index_add_(0, token, result * weights[token, choice].float()[:, None])
    return out
