"""Storing keys and values against its reference: every token at its place, and nothing anywhere else."""

from __future__ import annotations

import pytest
import torch

from kernels.launching import KernelArgumentError
from kernels.store_kv import launch, reference
from tests.kernels.comparing import FLOATS, lazy_zeros, normal, poisoned, strided


def store_both(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *, num_pages: int, page_size: int) -> torch.Tensor:
    """Store by kernel and by reference into poisoned pages, hold them equal bit for bit, and give them."""
    shape = (num_pages, page_size, 2, *keys.shape[1:])
    pages, wanted = poisoned(*shape, dtype=keys.dtype), poisoned(*shape, dtype=keys.dtype)
    launch.store_kv(keys, values, pages, slots)
    reference.store_kv(keys, values, wanted, slots)
    assert torch.equal(pages.isnan(), wanted.isnan()), "written where nothing belongs, or not where something does"
    assert torch.equal(pages.nan_to_num(), wanted.nan_to_num())
    return pages


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("num_heads", "head_dim", "page_size"), [(1, 1, 1), (3, 64, 16), (5, 80, 7), (2, 33, 64), (9, 128, 1)])
def test_tokens_go_to_their_slots(
    num_heads: int, head_dim: int, page_size: int, slot_type: torch.dtype, dtype: torch.dtype
) -> None:
    num_pages = 80 // page_size
    slots = torch.randperm(num_pages * page_size)[:13].to(slot_type)
    keys, values = (normal(13, num_heads, head_dim, dtype=dtype) for _ in range(2))
    store_both(keys, values, slots, num_pages=num_pages, page_size=page_size)


def test_padding_and_slots_of_no_page_write_nothing() -> None:
    slots = torch.tensor([3, -1, 64, 2**31, -(2**40), 63])
    pages = store_both(normal(6, 2, 8), normal(6, 2, 8), slots, num_pages=4, page_size=16)
    assert int((~pages.isnan()).sum()) == 2 * 2 * 2 * 8


def test_keys_and_values_may_be_parts_of_a_projection() -> None:
    """As the worker has them: keys first, or a slice of a fused projection with heads apart."""
    keys_values = normal(5, 2, 3, 16)
    store_both(keys_values[:, 0], keys_values[:, 1], torch.arange(5), num_pages=1, page_size=8)
    store_both(strided(normal(5, 3, 16), dim=1), strided(normal(5, 3, 16)), torch.arange(5), num_pages=1, page_size=8)


def test_pages_may_be_strided() -> None:
    """A layer's pages inside a tensor of all layers."""
    all_layers = poisoned(4, 3, 8, 2, 2, 16, dtype=torch.float32)
    keys, values = normal(2, 2, 16), normal(2, 2, 16)
    launch.store_kv(keys, values, all_layers[:, 1], torch.tensor([9, 30]))
    assert torch.equal(all_layers[1, 1, 1, 0], keys[0])
    assert torch.equal(all_layers[3, 1, 6, 1], values[1])
    assert int((~all_layers.isnan()).sum()) == 2 * 2 * 2 * 16


def test_offsets_reach_past_two_to_the_31() -> None:
    pages = lazy_zeros(2**20 + 9, 16, 2, 1, 64, dtype=torch.float16)
    keys, values = normal(1, 1, 64, dtype=torch.float16), normal(1, 1, 64, dtype=torch.float16)
    launch.store_kv(keys, values, pages, torch.tensor([(2**20 + 8) * 16 + 15]))
    assert torch.equal(pages[-1, -1, 0], keys[0])
    assert torch.equal(pages[-1, -1, 1], values[0])


def test_an_empty_step_writes_nothing() -> None:
    store_both(normal(0, 2, 8), normal(0, 2, 8), torch.zeros(0, dtype=torch.int64), num_pages=1, page_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(4, 2, 9)}, r"values must have or be shape \(4, 2, 8\), got shape \(4, 2, 9\)"),
        ({"layer_pages": torch.zeros(3, 16, 2, 4, 8)}, r"layer_pages must have or be shape \(any, any, 2, 2, 8\), got"),
        ({"layer_pages": torch.zeros(3, 16, 2, 2, 8).half()}, "layer_pages must have or be torch.float32, got torch.float16"),
        ({"slot_mapping": torch.zeros(5, dtype=torch.int64)}, r"slot_mapping must have or be shape \(4\), got shape \(5,\)"),
        ({"slot_mapping": torch.zeros(4)}, "slot_mapping must have or be torch.int32 or torch.int64, got torch.float32"),
        ({"slot_mapping": torch.zeros(8, dtype=torch.int64)[::2]}, "slot_mapping must have or be stride 1"),
    ],
    ids=["values", "heads", "page-type", "slots", "slot-type", "slot-stride"],
)
def test_wrong_arguments_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "keys": torch.zeros(4, 2, 8),
        "values": torch.zeros(4, 2, 8),
        "layer_pages": torch.zeros(3, 16, 2, 2, 8),
        "slot_mapping": torch.arange(4),
    }
    with pytest.raises(KernelArgumentError, match=message):
        launch.store_kv(**(arguments | changes))
