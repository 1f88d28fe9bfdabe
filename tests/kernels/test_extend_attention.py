"""Extend attention against its reference: prompts, chunks, cached prefixes and token trees, and nothing of another row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.attention_inputs import Scoring, TreeMask
from kernels.extend_attention import launch, reference
from kernels.launching import KernelArgumentError
from kernels.paged_decode_attention import launch as decode
from tests.kernels.comparing import FLOATS, assert_matches, lazy_zeros, normal, poisoned, strided
from tests.kernels.paging import Context, paged

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 30},
    "window-of-one": {"window": 1},
    "soft-cap": {"soft_cap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 50, "soft_cap": 5.0, "sinks": True},
}


def starts_of(counts: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(dtype)


def attend_both(
    queries: torch.Tensor,
    context: Context,
    counts: list[int],
    *,
    mask: TreeMask | None = None,
    out: torch.Tensor | None = None,
    **features: Any,
) -> torch.Tensor:
    """Attend by kernel and by reference, hold them together, and give the kernel's result."""
    if features.get("sinks") is True:
        features["sinks"] = normal(queries.shape[1])
    scoring = Scoring(queries.shape[2] ** -0.5, **features)
    starts = starts_of(counts, context.lengths.dtype)
    arguments = (queries, context.layer_pages, context.page_tables, starts, context.lengths)
    out = launch.extend_attention(*arguments, scoring=scoring, max_new_tokens=max([0, *counts]), mask=mask, out=out)
    assert_matches(out[: sum(counts)], reference.extend_attention(*arguments, scoring, mask)[: sum(counts)])
    return out


def tree_of(counts: list[int], lengths: list[int], dtype: torch.dtype = torch.int64) -> TreeMask:
    """Random token trees: each token but the first has a parent before it, sees its ancestors and itself, and lies at its depth."""
    parts, positions = [], []
    for count, length in zip(counts, lengths, strict=True):
        is_visible, depths = torch.eye(count, dtype=torch.bool), [0] * count
        for token in range(1, count):
            parent = int(torch.randint(0, token, (1,)))
            is_visible[token] |= is_visible[parent]
            depths[token] = depths[parent] + 1
        parts.append(is_visible.flatten())
        positions += [length - count + depth for depth in depths]
    starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)[:-1]
    return TreeMask(torch.cat(parts), starts.to(dtype), torch.tensor(positions, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size"),
    [(1, 1, 16, 1), (9, 3, 64, 16), (4, 4, 80, 7), (8, 1, 128, 64), (70, 1, 33, 16), (2, 1, 256, 16)],
)
def test_new_tokens_attend_over_prefix_and_each_other(
    num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    context = paged([1, 21, 75], num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    attend_both(normal(26, num_heads, head_dim, dtype=dtype), context, [1, 21, 4])


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_made_as_the_model_asks(features: dict[str, Any], dtype: torch.dtype) -> None:
    attend_both(normal(60, 4, 32, dtype=dtype), paged([50, 130, 9], dtype=dtype), [50, 1, 9], **features)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
def test_trees_see_their_ancestors(features: dict[str, Any], index_type: torch.dtype) -> None:
    counts, lengths = [5, 33, 1, 12], [70, 33, 40, 140]
    tree = tree_of(counts, lengths, index_type)
    attend_both(normal(51, 4, 32), paged(lengths, index_type=index_type), counts, mask=tree, **features)


def test_a_causal_tree_is_a_chunk() -> None:
    """A chain of tokens as a tree gives what no mask gives, also where a window ends."""
    counts, lengths = [7, 20], [60, 20]
    context, queries, sinks = paged(lengths), normal(27, 4, 32), normal(4)
    for window in (0, 25):
        chains = [torch.ones(count, count, dtype=torch.bool).tril() for count in counts]
        if window:
            chains = [chain & ~torch.ones_like(chain).tril(-window) for chain in chains]
        positions = torch.cat([torch.arange(length - count, length) for count, length in zip(counts, lengths, strict=True)])
        tree = TreeMask(torch.cat([chain.flatten() for chain in chains]), torch.tensor([0, 49]), positions)
        by_mask = attend_both(queries, context, counts, mask=tree, window=window, sinks=sinks)
        assert_matches(by_mask, attend_both(queries, context, counts, window=window, sinks=sinks))


def test_a_token_that_sees_nothing_gives_zeros() -> None:
    tree = TreeMask(torch.tensor([False, False, True, True]), torch.tensor([0]), torch.tensor([0, 1]))
    out = attend_both(normal(2, 2, 32), paged([2]), [2], mask=tree)
    assert not out[0].any()
    assert out[1].any()


def test_one_new_token_is_a_decode_row() -> None:
    context, queries, sinks = paged([70, 9, 33]), normal(3, 4, 32), normal(4)
    features = {"window": 40, "soft_cap": 4.0, "sinks": sinks}
    extended = attend_both(queries, context, [1, 1, 1], **features)
    decoded = decode.paged_decode_attention(
        queries,
        context.layer_pages,
        context.page_tables,
        context.lengths,
        scoring=Scoring(32**-0.5, **features),
        max_length=70,
    )
    assert_matches(extended, decoded)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, alone or together."""
    counts, lengths = [30, 3, 50], [30, 130, 64]
    context, queries = paged(lengths, dtype=torch.bfloat16), normal(83, 6, 32, dtype=torch.bfloat16)
    together, starts = attend_both(queries, context, counts, window=45), starts_of(counts)
    for row, count in enumerate(counts):
        alone = Context(context.layer_pages, context.page_tables[row : row + 1], context.lengths[row : row + 1])
        part = slice(int(starts[row]), int(starts[row + 1]))
        assert torch.equal(attend_both(queries[part], alone, [count], window=45), together[part])


def test_a_prompt_may_be_cut_anywhere() -> None:
    context, queries = paged([90]), normal(90, 4, 32)
    whole = attend_both(queries, context, [90], window=40)
    for cut in (1, 33, 89):
        head = Context(context.layer_pages, context.page_tables, torch.tensor([cut]))
        parts = (attend_both(queries[:cut], head, [cut], window=40), attend_both(queries[cut:], context, [90 - cut], window=40))
        assert_matches(torch.cat(parts), whole)


def test_rows_without_new_tokens_and_tokens_of_no_row_are_padding() -> None:
    """A captured graph's empty rows and tail tokens."""
    out = poisoned(10, 4, 32, dtype=torch.float32)
    attend_both(normal(10, 4, 32), paged([5, 0, 20, 7]), [5, 0, 2, 0], out=out)
    assert out[7:].isnan().all()


def test_queries_pages_and_outputs_may_be_strided() -> None:
    context = paged([40, 20])
    layers = torch.stack([torch.full_like(context.layer_pages, torch.nan), context.layer_pages], dim=1)
    fused = Context(layers[:, 1], strided(context.page_tables), context.lengths)
    qkv = normal(13, 8, 32)
    attend_both(qkv[:, :4], fused, [10, 3], out=strided(poisoned(13, 4, 32, dtype=torch.float32), dim=1))


def test_pages_past_two_to_the_31_are_reached() -> None:
    pages = lazy_zeros(2**15 + 9, 64, 2, 1, 512, dtype=torch.float16)[..., :32]
    table = torch.tensor([[2**15 + 8, 2**15 + 3]])
    pages[table[0]] = normal(2, 64, 2, 1, 32, dtype=torch.float16)
    attend_both(normal(3, 2, 32, dtype=torch.float16), Context(pages, table, torch.tensor([100])), [3])


def test_an_empty_step_is_an_empty_result() -> None:
    assert attend_both(normal(0, 4, 32), paged([]), []).shape == (0, 4, 32)
    assert attend_both(normal(0, 4, 32), paged([5, 6]), [0, 0]).shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(6, 5, 32)}, "num_heads must have or be a multiple of num_kv_heads = 2, got 5"),
        ({"layer_pages": torch.zeros(3, 65, 2, 2, 32)}, "page_size must have or be 1 to 64, got 65"),
        ({"page_tables": torch.zeros(3, 4).long()}, r"page_tables must have or be shape \(2, any\), got shape \(3, 4\)"),
        ({"query_starts": torch.zeros(2).long()}, r"query_starts must have or be shape \(3\), got shape \(2,\)"),
        ({"context_lengths": torch.zeros(2)}, "context_lengths must have or be torch.int32 or torch.int64"),
        ({"max_new_tokens": 7}, "max_new_tokens must have or be 0 to num_tokens = 6, got 7"),
        ({"mask": (torch.zeros(9), torch.zeros(2).long(), torch.zeros(6).long())}, "mask.is_visible must have or be torch.bool"),
        (
            {"mask": (torch.zeros(9).bool(), torch.zeros(1).long(), torch.zeros(6).long())},
            r"mask.starts must have or be shape \(2\)",
        ),
        ({"mask": (torch.zeros(9).bool(), torch.zeros(2).long(), torch.zeros(5).long())}, "mask.positions must have or be shape"),
        ({"out": torch.zeros(6, 4, 32).half()}, "out must have or be torch.float32, got torch.float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "queries": torch.zeros(6, 4, 32),
        "layer_pages": torch.zeros(3, 16, 2, 2, 32),
        "page_tables": torch.zeros(2, 4).long(),
        "query_starts": torch.tensor([0, 3, 6]),
        "context_lengths": torch.tensor([3, 3]),
        "max_new_tokens": 3,
        "scoring": Scoring(1.0),
    }
    if "mask" in changes:
        changes = {"mask": TreeMask(*changes["mask"])}
    with pytest.raises(KernelArgumentError, match=message):
        launch.extend_attention(**(arguments | changes))


def test_a_mask_over_too_many_new_tokens_is_refused() -> None:
    num_tokens = launch.MASKED_TOKENS_MAX + 1
    tree = TreeMask(torch.zeros(1).bool(), torch.tensor([0]), torch.zeros(num_tokens).long())
    with pytest.raises(KernelArgumentError, match="max_new_tokens must have or be at most 32768 with a mask, got 32769"):
        launch.extend_attention(
            torch.zeros(num_tokens, 1, 16),
            torch.zeros(1, 16, 2, 1, 16),
            torch.zeros(1, 1).long(),
            torch.tensor([0, num_tokens]),
            torch.tensor([num_tokens]),
            max_new_tokens=num_tokens,
            scoring=Scoring(1.0),
            mask=tree,
        )
