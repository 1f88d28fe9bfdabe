"""Rotary embedding against its reference, and the reference's tables against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.launching import KernelArgumentError
from kernels.rotary import launch, reference
from tests.kernels.comparing import FLOATS, assert_matches, far_rows, normal, strided

SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.8,
        "mscale_all_dim": 1.0,
    },
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.3,
        "truncate": False,
    },
}


def turn_both(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, *, half: int, is_interleaved: bool, scaling: Any = None
) -> None:
    """Turn by the kernel, in place, and hold both against the reference."""
    cos, sin = reference.table(2 * half, num_positions=100, theta=10_000.0, scaling=scaling)
    wanted = [reference.rotary(each, positions, cos, sin, is_interleaved=is_interleaved) for each in (queries, keys)]
    launch.rotary(queries, keys, positions, cos, sin, is_interleaved=is_interleaved)
    assert_matches(queries, wanted[0])
    assert_matches(keys, wanted[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("is_interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "half"), [(1, 1, 2, 1), (9, 3, 64, 32), (5, 2, 80, 16), (3, 1, 33, 7)]
)
def test_pairs_turn_by_their_positions(
    num_heads: int, num_kv_heads: int, head_dim: int, half: int, is_interleaved: bool, dtype: torch.dtype
) -> None:
    positions = torch.randint(0, 100, (5,))
    queries, keys = normal(5, num_heads, head_dim, dtype=dtype), normal(5, num_kv_heads, head_dim, dtype=dtype)
    turn_both(queries, keys, positions, half=half, is_interleaved=is_interleaved)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaling_lies_in_the_table(scaling: dict[str, Any] | None) -> None:
    turn_both(normal(4, 3, 16), normal(4, 1, 16), torch.randint(0, 100, (4,)), half=8, is_interleaved=False, scaling=scaling)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name: str) -> None:
    """Frequencies and attention factor of transformers' own function for the type, at a head of 128."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    cos, sin = reference.table(128, num_positions=9, theta=500_000.0, scaling=scaling)
    frequencies, factor = 1.0 / 500_000.0 ** (torch.arange(0, 128, 2) / 128), 1.0
    if scaling is not None:
        config = LlamaConfig(head_dim=128, rope_parameters=scaling | {"rope_theta": 500_000.0}, max_position_embeddings=131072)
        frequencies, factor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](config, cos.device)
    angles = torch.outer(torch.arange(9.0), frequencies)
    torch.testing.assert_close(cos, angles.cos() * factor)
    torch.testing.assert_close(sin, angles.sin() * factor)


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="rope_type 'longrope' is none of default, linear, llama3, yarn"):
        reference.table(8, num_positions=1, theta=1e4, scaling={"rope_type": "longrope"})


@pytest.mark.parametrize("is_interleaved", [False, True], ids=["halves", "interleaved"])
def test_lengths_stay_and_position_0_turns_nothing(is_interleaved: bool) -> None:
    """Without the reference: a rotation keeps each pair's length, and products of turned heads depend on distance alone."""
    cos, sin = reference.table(16, num_positions=100, theta=100.0)
    query, key = normal(1, 1, 16), normal(1, 1, 16)
    products = []
    for shift in (0, 40):
        q, k = query.clone(), key.clone()
        launch.rotary(q, k, torch.tensor([shift + 9]), cos, sin, is_interleaved=is_interleaved)
        k_apart = key.clone()
        launch.rotary(q[:, :0], k_apart, torch.tensor([shift + 2]), cos, sin, is_interleaved=is_interleaved)
        torch.testing.assert_close(q.norm(), query.norm())
        products.append((q * k_apart).sum())
    torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-4)
    still = query.clone()
    launch.rotary(still, key, torch.tensor([0]), cos, sin, is_interleaved=is_interleaved)
    assert torch.equal(still, query)


def test_padding_is_not_turned() -> None:
    queries, keys = normal(4, 2, 8), normal(4, 1, 8)
    before = queries.clone()
    turn_both(queries, keys, torch.tensor([-1, 7, 100, 2**40]), half=4, is_interleaved=False)
    assert torch.equal(queries[[0, 2, 3]], before[[0, 2, 3]])


def test_heads_turn_inside_a_fused_projection() -> None:
    qkv = normal(5, 7, 24)
    before = qkv.clone()
    turn_both(qkv[:, :4], qkv[:, 4:6], torch.arange(5, dtype=torch.int32), half=8, is_interleaved=True)
    assert torch.equal(qkv[:, 6], before[:, 6])
    assert torch.equal(qkv[..., 16:], before[..., 16:])
    turn_both(strided(normal(3, 4, 24), dim=1), strided(normal(3, 2, 24)), torch.arange(3), half=12, is_interleaved=False)


def test_an_empty_step_turns_nothing() -> None:
    turn_both(normal(0, 4, 8), normal(0, 2, 8), torch.zeros(0, dtype=torch.int64), half=4, is_interleaved=False)


def test_offsets_reach_past_two_to_the_31() -> None:
    queries = far_rows(4, 16, dtype=torch.float16)
    queries[2] = normal(4, 16, dtype=torch.float16)
    wanted = queries[2:].clone()
    cos, sin = reference.table(16, num_positions=9, theta=100.0)
    wanted = reference.rotary(wanted, torch.tensor([5]), cos, sin, is_interleaved=False)
    launch.rotary(queries, queries[:, :0], torch.tensor([-1, -1, 5]), cos, sin, is_interleaved=False)
    assert_matches(queries[2:], wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(4, 1, 16)}, r"keys must have or be shape \(4, any, 8\), got shape \(4, 1, 16\)"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions must have or be shape \(4\), got"),
        ({"positions": torch.zeros(4)}, "positions must have or be torch.int32 or torch.int64"),
        ({"cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}, "cos must have or be a table of 1 to 4 pairs, got 5"),
        ({"cos": torch.zeros(9, 4).half()}, "cos must have or be torch.float32, got torch.float16"),
        ({"sin": torch.zeros(9, 8)[:, ::2]}, "sin must have or be a contiguous tensor, got strides"),
    ],
    ids=["keys", "positions", "position-type", "table", "table-type", "table-stride"],
)
def test_wrong_arguments_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "queries": torch.zeros(4, 2, 8),
        "keys": torch.zeros(4, 1, 8),
        "positions": torch.arange(4),
        "cos": torch.zeros(9, 4),
        "sin": torch.zeros(9, 4),
    }
    with pytest.raises(KernelArgumentError, match=message):
        launch.rotary(**(arguments | changes), is_interleaved=False)
