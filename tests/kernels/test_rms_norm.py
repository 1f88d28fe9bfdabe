"""RMS normalisation against its reference: every row, whatever its length, strides and neighbours."""

from __future__ import annotations

import pytest
import torch

from kernels.launching import KernelArgumentError
from kernels.rms_norm import launch, reference
from tests.kernels.comparing import FLOATS, assert_matches, far_rows, normal, poisoned, strided

EPS = 1e-5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 1), (3, 63), (5, 576), (2, 2000), (17, 128)])
def test_rows_are_normalised(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    x, weight = normal(num_tokens, hidden_size, dtype=dtype), normal(hidden_size, dtype=dtype)
    assert_matches(launch.rms_norm(x, weight, eps=EPS), reference.rms_norm(x, weight, eps=EPS))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_the_residual_becomes_the_rounded_sum(dtype: torch.dtype, weight_offset: float) -> None:
    x, residual, weight = normal(5, 300, dtype=dtype), normal(5, 300, dtype=dtype), normal(300, dtype=dtype, scale=0.3)
    wanted, total = reference.add_rms_norm(x, residual, weight, eps=EPS, weight_offset=weight_offset)
    out = launch.add_rms_norm(x, residual, weight, eps=EPS, weight_offset=weight_offset)
    assert_matches(out, wanted)
    assert torch.equal(residual, total)


def test_heads_of_a_strided_projection_are_normalised_in_place() -> None:
    """Queries inside a fused projection: only they change."""
    qkv = normal(5, 7, 24)
    before = qkv.clone()
    heads, weight = qkv[:, 1:5], normal(24)
    wanted = reference.rms_norm(heads, weight, eps=EPS)
    launch.rms_norm(heads, weight, eps=EPS, out=heads)
    assert_matches(heads, wanted)
    assert torch.equal(qkv[:, 0], before[:, 0])
    assert torch.equal(qkv[:, 5:], before[:, 5:])


def test_rows_may_be_strided_and_gaps_stay_as_they_were() -> None:
    x, residual, weight = strided(normal(4, 50)), strided(normal(4, 50)), normal(50)
    out = strided(poisoned(4, 50, dtype=torch.float32))
    wanted, total = reference.add_rms_norm(x, residual, weight, eps=EPS)
    launch.add_rms_norm(x, residual, weight, eps=EPS, out=out)
    assert_matches(out, wanted)
    assert torch.equal(residual, total)
    gap = out.as_strided((3, 3), (53, 1), 50)
    assert gap.isnan().all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = normal(33, 96, dtype=torch.bfloat16), normal(96, dtype=torch.bfloat16)
    together = launch.rms_norm(x, weight, eps=EPS)
    alone = torch.cat([launch.rms_norm(x[row : row + 1], weight, eps=EPS) for row in range(33)])
    assert torch.equal(together, alone)


def test_an_empty_batch_is_an_empty_result() -> None:
    assert launch.rms_norm(normal(0, 64), normal(64), eps=EPS).shape == (0, 64)


def test_offsets_reach_past_two_to_the_31() -> None:
    x = far_rows(64, dtype=torch.float16)
    x[2] = normal(64, dtype=torch.float16)
    out = launch.rms_norm(x, torch.ones(64, dtype=torch.float16), eps=EPS)
    assert_matches(out[2], reference.rms_norm(x[2], torch.ones(64), eps=EPS))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(7), r"rms_norm: weight must have or be shape \(8\), got shape \(7,\)"),
        (torch.zeros(4, 8, dtype=torch.int32), torch.zeros(8), "rms_norm: x must have or be torch.float32 or .*, got torch.int32"),
        (torch.zeros(8, 4).T, torch.zeros(8), r"rms_norm: x must have or be stride 1 in the last dimension, got strides \(1, 4\)"),
        (torch.zeros(8), torch.zeros(8), "rms_norm: x must have or be 2 or 3 dimensions, got 1"),
        (torch.zeros(4, 8, device="meta"), torch.zeros(8), "rms_norm: weight must have or be device meta, got device c"),
        (torch.zeros(1, 40000), torch.zeros(40000), "rms_norm: x must have or be rows of 1 to 32768 elements, got 40000"),
    ],
    ids=["shape", "dtype", "stride", "dimensions", "device", "length"],
)
def test_wrong_arguments_are_named(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        launch.rms_norm(x, weight, eps=EPS)
