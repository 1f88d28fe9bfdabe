"""Decode attention against its reference: every grouping, page size and split, and nothing of what is not the row's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.attention_inputs import Scoring
from kernels.launching import KernelArgumentError
from kernels.paged_decode_attention import launch, reference
from tests.kernels.comparing import FLOATS, assert_matches, lazy_zeros, normal, poisoned, strided
from tests.kernels.paging import Context, paged

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 70},
    "window-of-one": {"window": 1},
    "soft-cap": {"soft_cap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 150, "soft_cap": 5.0, "sinks": True},
}


def attend_both(
    queries: torch.Tensor,
    context: Context,
    *,
    bound: float | None = None,
    out: torch.Tensor | None = None,
    **features: Any,
) -> torch.Tensor:
    """Attend by kernel and by reference, hold them together, and give the kernel's result."""
    if features.get("sinks") is True:
        features["sinks"] = normal(queries.shape[1])
    scoring = Scoring(queries.shape[2] ** -0.5, **features)
    max_length = max([0, *context.lengths.tolist()])
    arguments = (queries, context.layer_pages, context.page_tables, context.lengths)
    out = launch.paged_decode_attention(*arguments, scoring=scoring, max_length=max_length, out=out)
    assert_matches(out, reference.paged_decode_attention(*arguments, scoring), bound=bound)
    return out


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 tokens, four a row at most, so that short contexts reach every path."""
    monkeypatch.setattr(launch, "SPLIT_TOKENS_MIN", 64)
    monkeypatch.setattr(launch, "MAX_SPLITS", 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size"),
    [(1, 1, 16, 1), (9, 3, 64, 16), (4, 4, 80, 7), (8, 1, 128, 64), (20, 1, 33, 16), (2, 1, 256, 16)],
)
def test_rows_attend_over_their_pages(num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    context = paged([1, 17, 64, 100], num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    attend_both(normal(4, num_heads, head_dim, dtype=dtype), context)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("short_splits")
def test_split_rows_are_put_together(features: dict[str, Any], dtype: torch.dtype) -> None:
    """Rows of one split, of some, of the most, and of the most with longer splits; a padded one among them."""
    context = paged([3, 64, 65, 200, 0, 257, 600], dtype=dtype)
    out = attend_both(normal(7, 4, 32, dtype=dtype), context, **features)
    assert not out[4].any()


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.usefixtures("short_splits")
def test_indices_may_be_of_either_type(index_type: torch.dtype) -> None:
    attend_both(normal(2, 4, 32), paged([70, 9], index_type=index_type))


@pytest.mark.usefixtures("short_splits")
def test_a_row_does_not_depend_on_its_neighbours_or_the_grid() -> None:
    """Bit for bit, alone or together, whatever longest row the launch is told of."""
    context, queries = paged([30, 130, 64, 500], dtype=torch.bfloat16), normal(4, 6, 32, dtype=torch.bfloat16)
    features = {"window": 300, "sinks": normal(6)}
    together = attend_both(queries, context, **features)
    for row in range(4):
        alone = Context(context.layer_pages, context.page_tables[row : row + 1], context.lengths[row : row + 1])
        assert torch.equal(attend_both(queries[row : row + 1], alone, **features)[0], together[row])


@pytest.mark.usefixtures("short_splits")
def test_queries_pages_and_outputs_may_be_strided() -> None:
    context = paged([70, 20])
    layers = torch.stack([torch.full_like(context.layer_pages, torch.nan), context.layer_pages], dim=1)
    fused = Context(layers[:, 1], strided(context.page_tables), context.lengths)
    out = strided(poisoned(2, 4, 32, dtype=torch.float32), dim=1)
    attend_both(strided(normal(2, 4, 32), dim=1), fused, out=out)
    assert out.as_strided((2, 4, 3), (*out.stride()[:2], 1), 32)[0].isnan().all()


def test_large_scores_neither_overflow_nor_vanish() -> None:
    """Scores of thousands: two that nearly tie lose three digits of their difference."""
    context = paged([50])
    attend_both(normal(1, 2, 32) * 1000, context, bound=2e-2)
    attend_both(normal(1, 2, 32) * 1000, context, soft_cap=30.0, bound=2e-2)


@pytest.mark.usefixtures("short_splits")
def test_pages_past_two_to_the_31_are_reached() -> None:
    shape = (2**15 + 9, 64, 2, 1, 512)
    pages = lazy_zeros(*shape, dtype=torch.float16)[..., :32]
    table = torch.tensor([[2**15 + 8, 2**15 + 3]])
    pages[table[0]] = normal(2, 64, 2, 1, 32, dtype=torch.float16)
    attend_both(normal(1, 2, 32, dtype=torch.float16), Context(pages, table, torch.tensor([100])))


def test_an_empty_batch_is_an_empty_result() -> None:
    assert attend_both(normal(0, 4, 32), paged([])).shape == (0, 4, 32)


def test_padded_rows_give_zeros_and_read_nothing() -> None:
    assert not attend_both(normal(3, 4, 32), paged([0, 0, 0])).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(2, 5, 32)}, "num_heads must have or be a multiple of num_kv_heads = 2, got 5"),
        ({"queries": torch.zeros(2, 4, 16)}, r"layer_pages must have or be shape \(any, any, 2, any, 16\), got"),
        ({"queries": torch.zeros(2, 4, 32).half()}, "layer_pages must have or be torch.float16, got torch.float32"),
        ({"page_tables": torch.zeros(3, 4).long()}, r"page_tables must have or be shape \(2, any\), got shape \(3, 4\)"),
        ({"lengths": torch.zeros(2)}, "lengths must have or be torch.int32 or torch.int64, got torch.float32"),
        ({"max_length": 65}, "max_length must have or be 0 to 64 tokens, which the page tables hold, got 65"),
        ({"scoring": Scoring(0.0)}, "scoring.scale must have or be above 0, got 0.0"),
        ({"scoring": Scoring(1.0, window=-1)}, r"scoring.window must have or be 0 \(all\) or a number of tokens, got -1"),
        ({"scoring": Scoring(1.0, soft_cap=-1.0)}, r"scoring.soft_cap must have or be 0 \(none\) or a bound, got -1.0"),
        ({"scoring": Scoring(1.0, sinks=torch.zeros(4).half())}, "scoring.sinks must have or be torch.float32, got torch.float16"),
        ({"layer_pages": torch.zeros(3, 65, 2, 2, 32)}, "page_size must have or be 1 to 64, got 65"),
        ({"queries": torch.zeros(2, 2, 300), "layer_pages": torch.zeros(3, 16, 2, 2, 300)}, "head_dim must have or be 1 to 256"),
        ({"queries": torch.zeros(2, 258, 32)}, "num_heads must have or be 1 to 128 a key-value head, got 129"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "queries": torch.zeros(2, 4, 32),
        "layer_pages": torch.zeros(3, 16, 2, 2, 32),
        "page_tables": torch.zeros(2, 4).long(),
        "lengths": torch.zeros(2).long(),
        "max_length": 10,
        "scoring": Scoring(1.0),
    }
    with pytest.raises(KernelArgumentError, match=message):
        launch.paged_decode_attention(**(arguments | changes))
