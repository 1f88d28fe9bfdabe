"""`fused_moe` against its reference: routing, sorting by expert, and the experts' products."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from kernels.fused_moe import launch, reference
from kernels.fused_moe.launch import Tiles
from kernels.launching import KernelArgumentError, LaunchConfig
from tests.kernels.comparing import FLOATS, assert_matches, lazy_zeros, normal, poisoned, strided

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 8e-3}
"""Three roundings to the type, one after each product and one at the end, and sums over the inputs."""

SMALL = (Tiles(16, 16, 16, LaunchConfig(4)), Tiles(16, 32, 16, LaunchConfig(4)))
"""Tiles so small that small sizes take several, the last of each kind partly filled."""


def experts_of(num_tokens: int, top_k: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random routing: no expert twice a token."""
    experts = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k].int().contiguous()
    return torch.rand(num_tokens, top_k), experts


def layer_of(
    num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype = torch.float32, **form: Any
) -> reference.Experts:
    up = normal(num_experts, 2 * intermediate, hidden, dtype=dtype, scale=hidden**-0.5)
    return reference.Experts(up, normal(num_experts, hidden, intermediate, dtype=dtype, scale=intermediate**-0.5), **form)


# Routing


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "form"),
    [
        (9, 8, 2, {}),
        (3, 128, 8, {}),
        (5, 60, 4, {"renormalize": False}),
        (4, 32, 4, {"scale": 2.5}),
        (7, 33, 3, {"scoring": "sigmoid"}),
        (2, 17, 17, {"scoring": "sigmoid", "renormalize": False}),
        (300, 1, 1, {}),
    ],
    ids=["mixtral", "qwen3", "qwen2", "gpt-oss", "sigmoid", "all-experts", "one-expert"],
)
def test_a_token_gets_its_best_experts(
    num_tokens: int, num_experts: int, top_k: int, form: dict[str, Any], dtype: torch.dtype
) -> None:
    logits = normal(num_tokens, num_experts, dtype=dtype, scale=3.0)
    weights, experts = launch.route(strided(logits), top_k, **form)
    wanted_weights, wanted_experts = reference.route(logits, top_k, **form)
    assert torch.equal(experts, wanted_experts)
    assert_matches(weights, wanted_weights)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_selection_bias_chooses_and_does_not_weigh(scoring: reference.Scoring) -> None:
    logits, bias = normal(6, 40), normal(40)
    weights, experts = launch.route(logits, 5, scoring=scoring, selection_bias=bias, scale=2.5)
    wanted, _ = reference.route(logits, 5, scoring=scoring, selection_bias=bias, scale=2.5)
    scores = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
    # Experts whose ranks differ by a rounding may change places: ranks are compared, not numbers.
    rank = scores + bias
    assert_matches(rank.gather(1, experts.long()), rank.topk(5).values)
    assert_matches(weights.sort(1).values, wanted.sort(1).values)


def test_equal_logits_rank_by_expert_and_nan_ranks_last() -> None:
    """Goal: one answer whatever the hardware. Method: ties, zeros of both signs, infinities and NaN."""
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [-0.0, 0.0, -0.0, 0.0, -1.0], [nan, -1.0, -inf, -2.0, nan], [nan] * 5])
    _, experts = launch.route(logits, 4)
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [1, 3, 0, 2], [0, 1, 2, 3]]
    assert torch.equal(experts, reference.route(logits, 4)[1])


def test_no_tokens_are_routed_to_no_experts() -> None:
    weights, experts = launch.route(normal(0, 8), 2)
    assert weights.shape == experts.shape == (0, 2)


# Sorting


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "block_m"), [(1, 1, 1, 16), (5, 2, 7, 4), (150, 3, 5, 16), (700, 2, 100, 8)]
)
def test_assignments_are_sorted_by_expert_in_their_order(num_tokens: int, top_k: int, num_experts: int, block_m: int) -> None:
    _, experts = experts_of(num_tokens, top_k, num_experts)
    experts[torch.rand(experts.shape) < 0.1] = -1
    experts[torch.rand(experts.shape) < 0.1] = num_experts
    wanted, ends, totals = reference.sort_by_expert(experts, num_experts, block_m)
    found = launch.sort_by_expert(experts, num_experts, block_m)
    assert torch.equal(found.ends, ends)
    assert torch.equal(found.totals, totals)
    assert found.num_blocks_max * block_m >= len(wanted)
    is_row = wanted >= 0
    assert torch.equal(found.order[: len(wanted)][is_row], wanted[is_row])


def test_no_distribution_has_more_blocks_than_are_launched() -> None:
    """Goal: the bound holds, and is no larger than it must be. Method: every distribution of few assignments over few experts."""
    for num_experts in range(1, 5):
        most: dict[int, int] = {}
        for counts in itertools.product(range(9), repeat=num_experts):
            num_blocks = sum(-(-count // 4) for count in counts)
            most[sum(counts)] = max(most.get(sum(counts), 0), num_blocks)
        for num_assignments in range(1, 9):
            assert launch.num_blocks_max(num_assignments, num_experts, 4) == most[num_assignments]


# Experts


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden", "intermediate"), [(1, 4, 2, 48, 40), (21, 3, 2, 33, 21), (6, 9, 1, 16, 16)]
)
def test_tokens_get_their_experts_weighted_sum(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> None:
    x, layer = normal(num_tokens, hidden, dtype=dtype), layer_of(num_experts, hidden, intermediate, dtype)
    weights, experts = experts_of(num_tokens, top_k, num_experts)
    wanted = reference.fused_moe(x, layer, weights, experts)
    out = launch.fused_moe(x, layer, weights, experts, tiles=SMALL)
    assert_matches(out, wanted.to(dtype), bound=BOUNDS[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_default_tiles_give_the_same(dtype: torch.dtype) -> None:
    x, layer = normal(5, 100, dtype=dtype), layer_of(2, 100, 70, dtype)
    weights, experts = experts_of(5, 2, 2)
    assert_matches(
        launch.fused_moe(x, layer, weights, experts),
        reference.fused_moe(x, layer, weights, experts).to(dtype),
        bound=BOUNDS[dtype],
    )


@pytest.mark.parametrize(
    "form",
    [
        {"activation": "gelu_tanh"},
        {"activation": "swiglu_clamped", "is_interleaved": True},
        {"activation": "swiglu_clamped", "alpha": 1.1, "limit": 0.5},
        {"is_interleaved": True},
    ],
    ids=["gelu", "gpt-oss", "clamped-hard", "interleaved"],
)
def test_activations_layouts_and_biases(form: dict[str, Any]) -> None:
    x, layer = normal(4, 24, scale=3.0), layer_of(3, 24, 20, gate_up_bias=normal(3, 40), down_bias=normal(3, 24), **form)
    weights, experts = experts_of(4, 2, 3)
    wanted = reference.fused_moe(x, layer, weights, experts)
    assert_matches(launch.fused_moe(x, layer, weights, experts, tiles=SMALL), wanted, bound=BOUNDS[torch.float32])


def test_numbers_that_are_no_experts_add_nothing() -> None:
    """Padding, and experts of other ranks: a token with no expert of ours comes out as zeros, whatever its input."""
    x, layer = normal(5, 24), layer_of(3, 24, 16)
    weights, experts = experts_of(5, 2, 3)
    experts[1, 0], experts[2], experts[4, 1] = -1, -1, 3
    x[2] = torch.nan
    out = launch.fused_moe(x, layer, weights, experts, tiles=SMALL)
    assert_matches(out, reference.fused_moe(x, layer, weights, experts), bound=BOUNDS[torch.float32])
    assert (out[2] == 0).all()


def test_rows_may_be_strided_and_gaps_stay_as_they_were() -> None:
    x, layer = normal(5, 24), layer_of(3, 24, 16)
    weights, experts = experts_of(5, 2, 3)
    out = strided(poisoned(5, 24, dtype=torch.float32))
    gaps = reference.Experts(strided(layer.gate_up_weight, dim=1), strided(layer.down_weight, dim=1))
    launch.fused_moe(strided(x), gaps, weights, experts, out=out, tiles=SMALL)
    assert_matches(out, reference.fused_moe(x, layer, weights, experts), bound=BOUNDS[torch.float32])
    assert out.as_strided((4, 3), (27, 1), 24).isnan().all()


def test_the_result_may_take_the_place_of_the_input() -> None:
    x, layer = normal(3, 24), layer_of(3, 24, 16)
    weights, experts = experts_of(3, 2, 3)
    wanted = reference.fused_moe(x, layer, weights, experts)
    assert_matches(launch.fused_moe(x, layer, weights, experts, out=x, tiles=SMALL), wanted, bound=BOUNDS[torch.float32])


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, layer = normal(20, 24, dtype=torch.bfloat16), layer_of(3, 24, 16, torch.bfloat16)
    weights, experts = experts_of(20, 2, 3)
    together = launch.fused_moe(x, layer, weights, experts, tiles=SMALL)
    for token in (0, 7, 19):
        row = slice(token, token + 1)
        alone = launch.fused_moe(x[row], layer, weights[row], experts[row], tiles=SMALL)
        assert torch.equal(together[row], alone)


def test_an_empty_batch_is_an_empty_result() -> None:
    weights, experts = experts_of(0, 2, 3)
    assert launch.fused_moe(normal(0, 24), layer_of(3, 24, 16), weights, experts).shape == (0, 24)


def test_offsets_reach_past_two_to_the_31() -> None:
    """Goal: no 32-bit product of a stride. Method: the last expert lies 2^31 elements on, in memory never touched before."""
    x, layer = normal(2, 16, dtype=torch.float16), layer_of(2, 16, 16, torch.float16)
    weights, experts = torch.rand(2, 1), torch.ones(2, 1, dtype=torch.int32)
    far = lazy_zeros(2, 2**26 + 1, 32, dtype=torch.float16)
    far_layer = reference.Experts(far[:, :32, :16], far[:, 32:48, :16])
    far_layer.gate_up_weight[1], far_layer.down_weight[1] = layer.gate_up_weight[1], layer.down_weight[1]
    out = launch.fused_moe(x, far_layer, weights, experts, tiles=SMALL)
    assert_matches(out, reference.fused_moe(x, layer, weights, experts).to(torch.float16), bound=BOUNDS[torch.float16])


# Refusals


def test_wrong_arguments_are_named() -> None:
    x, layer = normal(2, 16), layer_of(3, 16, 8)
    weights, experts = experts_of(2, 2, 3)
    good = {"x": x, "layer": layer, "weights": weights, "experts": experts}
    for name, value, message in (
        ("x", x.int(), r"x must have or be torch.float32 or .*, got torch.int32"),
        ("weights", weights[:1], r"weights must have or be shape \(2, 2\), got shape \(1, 2\)"),
        ("weights", weights.T.contiguous().T, "weights must have or be a contiguous tensor"),
        ("experts", experts.long(), "experts must have or be torch.int32, got torch.int64"),
        ("experts", experts.to("meta"), f"experts must have or be device {x.device}, got device meta"),
        ("tiles", (SMALL[0], Tiles(32, 32, 16, LaunchConfig(4))), r"tiles must have or be one block_m, got \(16, 32\)"),
    ):
        with pytest.raises(KernelArgumentError, match=f"fused_moe: {message}"):
            launch.fused_moe(**(good | {name: value}))
    up, down = layer.gate_up_weight, layer.down_weight
    for name, value, message in (
        ("gate_up_weight", up[:, :15], r"gate_up_weight must have or be shape \(3, 16, 16\), got shape \(3, 15, 16\)"),
        ("down_weight", down.half(), "down_weight must have or be torch.float32, got torch.float16"),
        ("down_weight", down[:, :, :0], r"down_weight must have or be no size of 0, got \(3, 16, 0\)"),
        ("down_weight", down.mT.contiguous().mT, "down_weight must have or be stride 1 in the last dimension"),
        ("down_bias", normal(3, 8), r"down_bias must have or be shape \(3, 16\), got shape \(3, 8\)"),
        ("activation", "relu", "activation must have or be silu or gelu_tanh or swiglu_clamped, got relu"),
    ):
        with pytest.raises(KernelArgumentError, match=f"fused_moe: {message}"):
            launch.fused_moe(x, dataclasses.replace(layer, **{name: value}), weights, experts)


def test_wrong_routing_is_named() -> None:
    for logits, top_k, form, message in (
        (normal(2, 8), 9, {}, "top_k must have or be 1 to 8, got 9"),
        (normal(2, 64), 33, {}, "top_k must have or be 1 to 32, got 33"),
        (normal(2, 1025), 2, {}, "logits must have or be 1 to 1024 experts, got 1025"),
        (normal(8), 2, {}, r"logits must have or be shape \(any, any\), got shape \(8,\)"),
        (normal(2, 8), 2, {"scoring": "tanh"}, "scoring must have or be softmax or sigmoid, got tanh"),
        (normal(2, 8), 2, {"selection_bias": normal(7)}, r"selection_bias must have or be shape \(8\), got shape \(7,\)"),
    ):
        with pytest.raises(KernelArgumentError, match=f"route: {message}"):
            launch.route(logits, top_k, **form)
