"""Goal: every row is drawn from the distribution that its own parameters describe, whatever stands beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.philox import uniforms
from services.worker.sampler import draw_tokens, sample
from services.worker.sampling_table import SampledRows

VOCAB = 1000


def rows(count: int, **changes: Any) -> SampledRows:
    """`count` rows of one seed at the positions 0, 1, 2 …; `changes` are values for all rows or one each."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 9, "positions": np.arange(count)} | changes
    types = {
        "temperature": np.float32,
        "top_k": np.int32,
        "top_p": np.float32,
        "min_p": np.float32,
        "seeds": np.uint64,
        "positions": np.int64,
    }
    arrays = {name: np.broadcast_to(np.asarray(values[name], dtype=kind), (count,)).copy() for name, kind in types.items()}
    return SampledRows(slots=np.arange(count), **arrays)


def logits_of(probabilities: list[float], count: int) -> torch.Tensor:
    return torch.tensor(probabilities).log().expand(count, -1).contiguous()


def chi_square(token_ids: np.ndarray[Any, Any], expected: torch.Tensor) -> float:
    counts = np.bincount(token_ids, minlength=len(expected))
    wanted = expected.numpy() * len(token_ids)
    assert not counts[wanted == 0].any()
    return float((((counts - wanted) ** 2)[wanted > 0] / wanted[wanted > 0]).sum())


PROBABILITIES = [0.30, 0.02, 0.18, 0.05, 0.25, 0.08, 0.12]


@pytest.mark.parametrize(
    ("parameters", "weights"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, [p**2 for p in PROBABILITIES]),
        ({"temperature": 2.0}, [p**0.5 for p in PROBABILITIES]),
        ({"top_k": 3}, [0.30, 0, 0.18, 0, 0.25, 0, 0]),
        ({"top_p": 0.5}, [0.30, 0, 0, 0, 0.25, 0, 0]),
        ({"top_p": 0.74}, [0.30, 0, 0.18, 0, 0.25, 0, 0.12]),
        ({"min_p": 0.5}, [0.30, 0, 0.18, 0, 0.25, 0, 0]),
        ({"top_k": 4, "top_p": 0.6}, [0.30, 0, 0, 0, 0.25, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_follow_the_distribution(parameters: dict[str, float], weights: list[float]) -> None:
    """Chi-square with at most 6 degrees of freedom; 40 is passed by chance less than once in 10⁶."""
    count = 20_000
    token_ids, is_finite = sample(logits_of(PROBABILITIES, count), rows(count, **parameters))
    assert is_finite.all()
    assert chi_square(token_ids, torch.tensor(weights) / sum(weights)) < 40


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))
    token_ids, _ = sample(logits, rows(16, temperature=0.0, top_k=3, top_p=0.1))
    assert token_ids.tolist() == logits.argmax(-1).tolist()


def test_a_rows_token_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    mixed = {
        "temperature": [0.0, 0.7, 1.0, 1.3] * 3,
        "top_k": [0, 0, 5, 50, 1, 0] * 2,
        "top_p": [1.0, 0.9, 0.3, 0.95] * 3,
        "min_p": [0.0, 0.0, 0.05] * 4,
        "seeds": np.arange(12) * 1_000_003,
        "positions": np.arange(12) * 7,
    }
    together, _ = sample(logits, rows(12, **mixed))
    for row in range(12):
        alone, _ = sample(logits[row : row + 1], rows(1, **{name: [values[row]] for name, values in mixed.items()}))
        assert alone[0] == together[row]


def test_nucleus_wider_than_the_first_candidates_is_found() -> None:
    """A flat distribution, whose nucleus no short list of candidates holds, against a whole sort."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(3)) * 0.1
    count = 4000
    token_ids, _ = sample(logits.expand(count, -1).contiguous(), rows(count, top_p=0.8))
    probabilities, order = logits[0].softmax(-1).sort(descending=True)
    nucleus = set(order[: int((probabilities.cumsum(-1) < 0.8).sum()) + 1].tolist())
    drawn = set(token_ids.tolist())
    assert drawn <= nucleus
    assert len(drawn) > 0.5 * len(nucleus)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_with_a_non_finite_logit_fails_alone(bad: float, temperature: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    expected, _ = sample(logits, rows(3, temperature=temperature))
    spoiled = logits.clone()
    spoiled[1, 17] = bad
    token_ids, is_finite = sample(spoiled, rows(3, temperature=temperature))
    assert is_finite.tolist() == [True, False, True]
    assert token_ids[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_smallest_temperatures_become_greedy_without_overflow() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5)) * 1000
    token_ids, is_finite = sample(logits, rows(4, temperature=[1e-38, 1e-20, 1e-6, 1e-3]))
    assert is_finite.all()
    assert token_ids.tolist() == logits.argmax(-1).tolist()


def test_ties_at_the_border_are_all_kept() -> None:
    count = 2000
    token_ids, _ = sample(torch.zeros(count, 4), rows(count, top_k=2))
    assert set(token_ids.tolist()) == {0, 1, 2, 3}


def test_parameters_at_their_limits_keep_everything() -> None:
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(6))
    plain, _ = sample(logits, rows(64))
    for parameters in ({"top_k": VOCAB}, {"top_k": VOCAB + 5}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert sample(logits, rows(64, **parameters))[0].tolist() == plain.tolist()


class Ruling:
    """Rules some tokens out of some rows."""

    def __init__(self, indices: list[int], token_ids: list[int]) -> None:
        self.indices = np.array(indices, dtype=np.int64)
        self.token_ids = token_ids

    def adjust(self, logits: torch.Tensor, rows: SampledRows) -> np.ndarray[Any, np.dtype[np.int64]]:
        for index in self.indices:
            logits[index, self.token_ids] = -torch.inf
        return self.indices


def test_what_adjustments_rule_out_is_neither_the_likeliest_nor_drawn() -> None:
    count = 2000
    logits = logits_of(PROBABILITIES, count)
    temperature = np.where(np.arange(count) % 2 == 0, 0.0, 1.0)
    adjusted = [index for index in range(count) if index % 4 < 2]
    found, is_finite = sample(logits, rows(count, temperature=temperature), None, [Ruling(adjusted, [0]), Ruling(adjusted, [4, 2])])
    assert is_finite.all()
    by_kind = [set(found[kind::4].tolist()) for kind in range(4)]
    assert by_kind[0] == {6}
    assert by_kind[1] == {1, 3, 5, 6}
    assert by_kind[2] == {0}
    assert by_kind[3] == set(range(7))


def test_what_draws_is_given_all_rows_and_which_of_them_to_draw_for() -> None:
    """A greedy row and one that is not finite stand between those that are drawn; no logits are copied for these."""
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(7))
    logits[3, 1] = torch.nan
    asked = rows(5, temperature=[1.0, 0.0, 0.7, 1.0, 1.0])
    calls = []

    def draw(given: torch.Tensor, given_rows: SampledRows, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        calls.append((given.data_ptr(), given_rows, indices.tolist()))
        return draw_tokens(given, given_rows, indices)

    expected, _ = sample(logits, asked)
    token_ids, _ = sample(logits, asked, draw=draw)
    assert calls == [(logits.data_ptr(), asked, [0, 2, 4])]
    assert token_ids.tolist() == expected.tolist()


def plain_draw(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> set[int]:
    """Tokens that the documented order of filters can give, one token at a time; more than one where the draw is at a border."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    ranked = sorted(weights, reverse=True)
    if top_k:
        weights = [weight if weight >= ranked[min(top_k, len(ranked)) - 1] else 0.0 for weight in weights]
    total, before, least = sum(weights), 0.0, 0.0
    for weight in sorted(weights, reverse=True):
        if before / total >= top_p:
            break
        before, least = before + weight, weight
    weights = [weight if weight >= least and weight >= min_p else 0.0 for weight in weights]
    target, cumulative, found = uniform * sum(weights), 0.0, set()
    for token_id, weight in enumerate(weights):
        slack = 1e-5 * sum(weights)
        if weight and cumulative - slack <= target <= cumulative + weight + slack:
            found.add(token_id)
        cumulative += weight
    return found


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-24, 24), min_size=2, max_size=30, unique=True).map(lambda values: [value / 8 for value in values]),
    temperature=st.sampled_from([0.5, 1.0, 1.75]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 0.93, 0.61, 0.17]),
    min_p=st.sampled_from([0.0, 0.07, 0.33, 0.9]),
    seed=st.integers(0, 2**64 - 1),
)
def test_draws_are_those_of_a_plain_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    asked = rows(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=np.uint64(seed))
    found, _ = sample(torch.tensor([logits]), asked)
    uniform = float(uniforms(asked.seeds, asked.positions)[0])
    assert int(found[0]) in plain_draw(logits, temperature, top_k, top_p, min_p, uniform)
