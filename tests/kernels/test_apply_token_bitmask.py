"""Excluding tokens by bits against its reference: bit for bit."""

from __future__ import annotations

import pytest
import torch

from kernels.apply_token_bitmask import launch, reference
from kernels.launching import KernelArgumentError
from tests.kernels.comparing import FLOATS, far_rows, normal, strided


def bits(num_masks: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (num_masks, -(-vocab_size // 32))).int()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 5000])
@pytest.mark.parametrize("row_type", [torch.int32, torch.int64], ids=str)
def test_excluded_tokens_lose_their_logits(vocab_size: int, dtype: torch.dtype, row_type: torch.dtype) -> None:
    logits, bitmask, rows = normal(5, vocab_size, dtype=dtype), bits(3, vocab_size), torch.tensor([4, 0, 2], dtype=row_type)
    wanted = logits.clone()
    reference.apply_token_bitmask(wanted, bitmask, rows)
    launch.apply_token_bitmask(logits, bitmask, rows)
    assert torch.equal(logits, wanted)


def test_each_bit_is_one_token() -> None:
    """Without the reference: words with one bit set each, the sign bit among them."""
    bitmask = (torch.ones(32, dtype=torch.int64) << torch.arange(32)).to(torch.int32).unsqueeze(1).repeat(1, 2)
    logits = torch.zeros(32, 64)
    launch.apply_token_bitmask(logits, bitmask, torch.arange(32))
    assert torch.equal(logits == 0, torch.eye(32, dtype=torch.bool).repeat(1, 2))


def test_padding_changes_nothing() -> None:
    logits = normal(3, 40)
    before = logits.clone()
    launch.apply_token_bitmask(logits, torch.zeros(2, 2, dtype=torch.int32), torch.tensor([-1, 3]))
    assert torch.equal(logits, before)


def test_rows_and_masks_may_be_strided() -> None:
    logits, bitmask, rows = strided(normal(4, 70)), strided(bits(2, 70)), torch.tensor([3, 1])
    wanted = logits.clone()
    reference.apply_token_bitmask(wanted, bitmask, rows)
    launch.apply_token_bitmask(logits, bitmask, rows)
    assert torch.equal(logits, wanted)
    assert logits.as_strided((3, 3), (73, 1), 70).isnan().all()


def test_no_mask_and_no_row_are_no_work() -> None:
    launch.apply_token_bitmask(normal(3, 8), bits(0, 8), torch.zeros(0, dtype=torch.int64))
    launch.apply_token_bitmask(normal(0, 8), bits(1, 8), torch.tensor([0]))


def test_offsets_reach_past_two_to_the_31() -> None:
    logits = far_rows(64, dtype=torch.float16)
    launch.apply_token_bitmask(logits, torch.tensor([[1, -1]], dtype=torch.int32), torch.tensor([2]))
    assert logits[2, 0] == 0
    assert torch.isneginf(logits[2, 1:32]).all()
    assert not logits[2, 32:].any()


@pytest.mark.parametrize(
    ("bitmask", "rows", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0]), r"bitmask must have or be shape \(1, 2\), got shape \(1, 3\)"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), "bitmask must have or be torch.int32, got torch.int64"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0.0]), "rows must have or be torch.int32 or torch.int64"),
    ],
    ids=["words", "type", "rows"],
)
def test_wrong_arguments_are_named(bitmask: torch.Tensor, rows: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        launch.apply_token_bitmask(torch.zeros(4, 64), bitmask, rows)
