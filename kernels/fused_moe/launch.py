"""Host side of `fused_moe`: checks, tiles, launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, get_args

import torch

from kernels.architecture import Architecture, architecture_of
from kernels.fused_moe.kernel import (
    fused_moe_count_kernel,
    fused_moe_down_kernel,
    fused_moe_gate_up_kernel,
    fused_moe_order_kernel,
    fused_moe_place_kernel,
    fused_moe_route_kernel,
    fused_moe_sum_kernel,
)
from kernels.fused_moe.reference import Activation, Experts, Scoring
from kernels.launching import FLOAT_TYPES, Arguments, LaunchConfig, next_power_of_2

NUM_EXPERTS_MAX: Final = 1024
"""Experts, which one program ranks in registers."""

TOP_K_MAX: Final = 32

CHUNK: Final = 128
"""Assignments that one program counts, and puts in order."""

GROUP_M: Final = 8
"""Blocks of rows that walk the weights together."""

SMALL: Final = LaunchConfig(num_warps=4)
"""How the kernels beside the products are compiled."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a product's tile: rows, columns, inputs a step. The first product takes `block_n` rows of gate and as many of up."""

    block_m: int
    block_n: int
    block_k: int
    config: LaunchConfig


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Assignments sorted by expert; see `reference.sort_by_expert`. `order` is not written where it is padding."""

    order: torch.Tensor
    ends: torch.Tensor
    totals: torch.Tensor
    num_blocks_max: int


def tiles_of(architecture: Architecture, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Choose the tiles of the two products, by nothing but these two: a token is computed alike in every batch."""
    if dtype == torch.float32:
        config = LaunchConfig(num_warps=4, num_stages=2)
        return Tiles(32, 32, 32, config), Tiles(32, 64, 32, config)
    if architecture.backend == "hip":
        config = LaunchConfig(num_warps=4, num_stages=2)
        return Tiles(64, 64, 64, config), Tiles(64, 128, 64, config)
    config = LaunchConfig(num_warps=4, num_stages=3)
    return Tiles(64, 64, 64, config), Tiles(64, 128, 64, config)


def route_constants(num_experts: int, top_k: int) -> dict[str, Any]:
    """Constants of the routing kernel that sizes decide."""
    block_experts = next_power_of_2(num_experts)
    return {
        "TOP_K": top_k,
        "BLOCK_TOKENS": max(1024 // block_experts, 1),
        "BLOCK_EXPERTS": block_experts,
        "BLOCK_CHOICES": next_power_of_2(top_k),
    }


def place_constants(num_experts: int, block_m: int) -> dict[str, Any]:
    """Constants of the placing kernel."""
    block_experts = next_power_of_2(num_experts)
    return {"BLOCK_M": block_m, "BLOCK_CHUNKS": max(4096 // block_experts, 1), "BLOCK_EXPERTS": block_experts}


def product_constants(tiles: Tiles, num_experts: int) -> dict[str, Any]:
    """Constants that both products have."""
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_EXPERTS": next_power_of_2(num_experts),
        "GROUP_M": GROUP_M,
    }


def sum_constants(hidden: int, top_k: int) -> dict[str, Any]:
    """Constants of the summing kernel."""
    return {"TOP_K": top_k, "BLOCK": min(next_power_of_2(hidden), 1024)}


def num_blocks_max(num_assignments: int, num_experts: int, block_m: int) -> int:
    """How many blocks the worst distribution of assignments over experts fills: one alone in as many blocks as can be."""
    return (num_assignments + min(num_assignments, num_experts) * (block_m - 1)) // block_m


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    selection_bias: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token, and their weights; see `reference.route`.

    Args:
        logits: `[num_tokens, num_experts]`; rows may be strided.
        top_k: Experts a token.
        scoring: `softmax` or `sigmoid`.
        renormalize: Divide the weights by their sum.
        selection_bias: `[num_experts]` float32, contiguous.
        scale: Factor of all weights.

    Returns:
        Weights `[num_tokens, top_k]` float32 and experts `[num_tokens, top_k]` int32.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("route", logits.device)
    arguments.tensor("logits", logits, shape=(None, None), dtypes=FLOAT_TYPES)
    num_tokens, num_experts = logits.shape
    arguments.require(1 <= num_experts <= NUM_EXPERTS_MAX, "logits", f"1 to {NUM_EXPERTS_MAX} experts", num_experts)
    limit = min(num_experts, TOP_K_MAX)
    arguments.require(1 <= top_k <= limit, "top_k", f"1 to {limit}", top_k)
    arguments.require(scoring in get_args(Scoring), "scoring", " or ".join(get_args(Scoring)), scoring)
    if selection_bias is not None:
        arguments.tensor("selection_bias", selection_bias, shape=(num_experts,), dtypes=(torch.float32,))
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    if num_tokens == 0:
        return weights, experts
    constants = route_constants(num_experts, top_k)
    fused_moe_route_kernel[(-(-num_tokens // constants["BLOCK_TOKENS"]),)](
        logits,
        selection_bias,
        weights,
        experts,
        num_tokens,
        num_experts,
        logits.stride(0),
        scale,
        IS_SIGMOID=scoring == "sigmoid",
        RENORMALIZE=renormalize,
        HAS_SELECTION_BIAS=selection_bias is not None,
        **constants,
        **SMALL.options(),
    )
    return weights, experts


def sort_by_expert(experts: torch.Tensor, num_experts: int, block_m: int) -> ExpertOrder:
    """Order assignments by expert, each expert's padded to whole blocks, without waiting for the device.

    Args:
        experts: int32 `[num_tokens, top_k]`, contiguous, at least one token.
        num_experts: Experts there are.
        block_m: Rows of a block.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("sort_by_expert", experts.device)
    arguments.tensor("experts", experts, shape=(None, None), dtypes=(torch.int32,), is_contiguous=True)
    arguments.require(1 <= num_experts <= NUM_EXPERTS_MAX, "num_experts", f"1 to {NUM_EXPERTS_MAX}", num_experts)
    num_assignments = experts.numel()
    # Padding included, positions in the order are 32-bit numbers.
    limit = 2**31 - 1 - num_experts * block_m
    arguments.require(1 <= num_assignments <= limit, "experts", f"1 to {limit} assignments", num_assignments)
    num_blocks = num_blocks_max(num_assignments, num_experts, block_m)
    num_chunks = -(-num_assignments // CHUNK)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=experts.device)

    counts, before = integers(num_chunks, num_experts), integers(num_chunks, num_experts)
    ends, totals, order = integers(num_experts), integers(num_experts), integers(num_blocks * block_m)
    constants = place_constants(num_experts, block_m)
    fused_moe_count_kernel[(num_chunks,)](
        experts, counts, num_assignments, num_experts, CHUNK=CHUNK, BLOCK_EXPERTS=constants["BLOCK_EXPERTS"], **SMALL.options()
    )
    fused_moe_place_kernel[(1,)](counts, before, ends, totals, num_chunks, num_experts, **constants, **SMALL.options())
    fused_moe_order_kernel[(num_chunks,)](
        experts, before, ends, totals, order, num_assignments, num_experts, BLOCK_M=block_m, CHUNK=CHUNK, **SMALL.options()
    )
    return ExpertOrder(order, ends, totals, num_blocks)


def fused_moe(
    x: torch.Tensor,
    layer: Experts,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> torch.Tensor:
    """Sum each token's experts by weight; see `reference.fused_moe`.

    What passes between the products, `num_tokens * top_k * (intermediate + hidden)` elements of x's type, is allocated here.

    Args:
        x: `[num_tokens, hidden]`; rows may be strided.
        layer: The experts, weights of x's type; only the last dimension of a tensor must be dense.
        weights: `[num_tokens, top_k]` float32, contiguous.
        experts: `[num_tokens, top_k]` int32, contiguous; what is no expert's number adds nothing.
        out: `[num_tokens, hidden]` of x's type; may be `x`. A new tensor by default.
        tiles: Of the two products, with one `block_m`; by default `tiles_of` the device.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("fused_moe", x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check_layer(arguments, x, layer)
    _check_rows(arguments, x, weights, experts, out)
    first, second = tiles or tiles_of(architecture_of(x.device), x.dtype)
    arguments.require(first.block_m == second.block_m, "tiles", "one block_m", (first.block_m, second.block_m))
    num_tokens, top_k = experts.shape
    if num_tokens == 0:
        return out
    num_experts, hidden, intermediate = layer.down_weight.shape
    by_expert = sort_by_expert(experts, num_experts, first.block_m)
    activated = torch.empty((num_tokens * top_k, intermediate), dtype=x.dtype, device=x.device)
    _gate_up(x, layer, activated, by_expert, first, top_k=top_k)
    parts = torch.empty((num_tokens * top_k, hidden), dtype=x.dtype, device=x.device)
    _down(activated, layer, weights, parts, by_expert, second)
    constants = sum_constants(hidden, top_k)
    fused_moe_sum_kernel[(num_tokens, -(-hidden // constants["BLOCK"]))](
        parts, experts, out, num_experts, hidden, out.stride(0), **constants, **SMALL.options()
    )
    return out


def _check_layer(arguments: Arguments, x: torch.Tensor, layer: Experts) -> None:
    arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
    arguments.tensor("down_weight", layer.down_weight, shape=(None, x.shape[1], None), dtypes=(x.dtype,))
    num_experts, hidden, intermediate = layer.down_weight.shape
    arguments.require(1 <= num_experts <= NUM_EXPERTS_MAX, "down_weight", f"1 to {NUM_EXPERTS_MAX} experts", num_experts)
    arguments.require(hidden > 0 and intermediate > 0, "down_weight", "no size of 0", tuple(layer.down_weight.shape))
    arguments.tensor("gate_up_weight", layer.gate_up_weight, shape=(num_experts, 2 * intermediate, hidden), dtypes=(x.dtype,))
    for name, bias, width in (("gate_up_bias", layer.gate_up_bias, 2 * intermediate), ("down_bias", layer.down_bias, hidden)):
        if bias is not None:
            arguments.tensor(name, bias, shape=(num_experts, width), dtypes=FLOAT_TYPES)
    activations = get_args(Activation)
    arguments.require(layer.activation in activations, "activation", " or ".join(activations), layer.activation)


def _check_rows(arguments: Arguments, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> None:
    arguments.tensor("experts", experts, shape=(x.shape[0], None), dtypes=(torch.int32,), is_contiguous=True)
    top_k = experts.shape[1]
    arguments.require(1 <= top_k <= TOP_K_MAX, "experts", f"1 to {TOP_K_MAX} a token", top_k)
    arguments.tensor("weights", weights, shape=experts.shape, dtypes=(torch.float32,), is_contiguous=True)
    arguments.tensor("out", out, shape=x.shape, dtypes=(x.dtype,))


def _gate_up(
    x: torch.Tensor,
    layer: Experts,
    out: torch.Tensor,
    by_expert: ExpertOrder,
    tiles: Tiles,
    *,
    top_k: int,
) -> None:
    weight, bias = layer.gate_up_weight, layer.gate_up_bias
    num_experts, hidden, intermediate = weight.shape[0], weight.shape[2], out.shape[1]
    fused_moe_gate_up_kernel[(by_expert.num_blocks_max * -(-intermediate // tiles.block_n),)](
        x,
        weight,
        bias,
        out,
        by_expert.order,
        by_expert.ends,
        by_expert.totals,
        by_expert.num_blocks_max,
        num_experts,
        hidden,
        intermediate,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        0 if bias is None else bias.stride(0),
        layer.alpha,
        layer.limit,
        TOP_K=top_k,
        ACTIVATION=layer.activation,
        IS_INTERLEAVED=layer.is_interleaved,
        HAS_BIAS=bias is not None,
        **product_constants(tiles, num_experts),
        **tiles.config.options(),
    )


def _down(
    activated: torch.Tensor,
    layer: Experts,
    router_weights: torch.Tensor,
    out: torch.Tensor,
    by_expert: ExpertOrder,
    tiles: Tiles,
) -> None:
    weight, bias = layer.down_weight, layer.down_bias
    num_experts, hidden, intermediate = weight.shape
    fused_moe_down_kernel[(by_expert.num_blocks_max * -(-hidden // tiles.block_n),)](
        activated,
        weight,
        bias,
        router_weights,
        out,
        by_expert.order,
        by_expert.ends,
        by_expert.totals,
        by_expert.num_blocks_max,
        num_experts,
        hidden,
        intermediate,
        weight.stride(0),
        weight.stride(1),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        **product_constants(tiles, num_experts),
        **tiles.config.options(),
    )
