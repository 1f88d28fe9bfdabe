"""Gated activations against their reference."""

from __future__ import annotations

import pytest
import torch

from kernels.act_and_mul import launch, reference
from kernels.launching import KernelArgumentError
from tests.kernels.comparing import FLOATS, assert_matches, far_rows, normal, poisoned, strided


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", launch.ACTIVATIONS)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 40), (3, 63), (2, 1500)])
def test_gates_are_applied(num_tokens: int, size: int, activation: str, dtype: torch.dtype) -> None:
    gate_up = normal(num_tokens, 2 * size, dtype=dtype, scale=3)
    assert_matches(launch.act_and_mul(gate_up, activation), reference.act_and_mul(gate_up, activation))


def test_names_of_models_mean_these_activations() -> None:
    gate_up = normal(3, 20)
    assert torch.equal(launch.silu_and_mul(gate_up), launch.act_and_mul(gate_up, "silu"))
    assert torch.equal(launch.gelu_and_mul(gate_up, approximate=True), launch.act_and_mul(gate_up, "gelu_tanh"))
    assert torch.equal(launch.gelu_and_mul(gate_up, approximate=False), launch.act_and_mul(gate_up, "gelu"))


def test_a_row_may_hold_one_element() -> None:
    for activation in launch.ACTIVATIONS:
        gate_up = torch.tensor([[1.5, 2.0]])
        assert_matches(launch.act_and_mul(gate_up, activation), reference.act_and_mul(gate_up, activation))


def test_large_values_neither_overflow_nor_vanish() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    for activation in launch.ACTIVATIONS:
        torch.testing.assert_close(launch.act_and_mul(gate_up, activation), reference.act_and_mul(gate_up, activation))


def test_rows_may_be_strided_and_gaps_stay_as_they_were() -> None:
    gate_up, out = strided(normal(4, 100)), strided(poisoned(4, 50, dtype=torch.float32))
    launch.act_and_mul(gate_up, "silu", out=out)
    assert_matches(out, reference.act_and_mul(gate_up, "silu"))
    assert out.as_strided((3, 3), (53, 1), 50).isnan().all()


def test_an_empty_batch_is_an_empty_result() -> None:
    assert launch.silu_and_mul(normal(0, 64)).shape == (0, 32)


def test_offsets_reach_past_two_to_the_31() -> None:
    gate_up = far_rows(64, dtype=torch.float16)
    gate_up[2] = normal(64, dtype=torch.float16)
    assert_matches(launch.silu_and_mul(gate_up)[2:], reference.act_and_mul(gate_up[2:], "silu"))


@pytest.mark.parametrize(
    ("gate_up", "activation", "message"),
    [
        (torch.zeros(4, 7), "silu", "gate_up must have or be an even number of columns, got 7"),
        (torch.zeros(4, 8), "swish", "activation must have or be one of silu, gelu, gelu_tanh, relu, got 'swish'"),
        (torch.zeros(4, 8, dtype=torch.float64), "silu", "gate_up must have or be torch.float32 or .*, got torch.float64"),
        (torch.zeros(8, 4).T, "silu", "gate_up must have or be stride 1 in the last dimension"),
    ],
    ids=["odd", "activation", "dtype", "stride"],
)
def test_wrong_arguments_are_named(gate_up: torch.Tensor, activation: str, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        launch.act_and_mul(gate_up, activation)


def test_a_wrong_output_is_named() -> None:
    with pytest.raises(KernelArgumentError, match=r"out must have or be shape \(4, 4\), got shape \(4, 8\)"):
        launch.silu_and_mul(torch.zeros(4, 8), out=torch.zeros(4, 8))
