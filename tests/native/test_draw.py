"""Goal: the native draw gives the tokens of `sampler.draw_tokens`, but where a draw is at a border to within rounding, and one
row's token never depends on another row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.worker.native_draw import NativeDraw
from services.worker.philox import uniforms
from services.worker.sampler import draw_tokens
from services.worker.sampling_table import SampledRows

Logits = npt.NDArray[np.float32]

SLACK = 1e-5
"""Of the whole mass: what sums of float32 may differ by."""


def rows(count: int, **changes: Any) -> SampledRows:
    """`count` rows; `changes` are values for all rows or one each."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 9, "positions": np.arange(count)} | changes
    types = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    types |= {"seeds": np.uint64, "positions": np.int64}
    arrays = {name: np.broadcast_to(np.asarray(values[name], dtype=kind), (count,)).copy() for name, kind in types.items()}
    return SampledRows(slots=np.arange(count), **arrays)


def draw(library: Any, isa: int, logits: Logits, asked: SampledRows) -> npt.NDArray[np.int64]:
    native = NativeDraw(library, logits.shape[1], isa=isa)
    return native(torch.from_numpy(logits), asked, np.arange(len(logits)))


def possible(logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> set[int]:
    """Tokens that the documented order of filters can give, in float64; more than one where something is at a border."""
    scaled = (logits - logits.max()).astype(np.float64) / temperature
    found: set[int] = set()
    for nudge in (-SLACK, 0.0, SLACK):
        weights = np.exp(scaled)
        if 0 < top_k < len(weights):
            weights[scaled < np.sort(scaled)[-top_k]] = 0
        ranked = np.sort(weights)[::-1]
        before = (np.cumsum(ranked) - ranked) / ranked.sum()
        if top_p < 1:
            weights[weights < ranked[max(int((before < top_p + nudge).sum()), 1) - 1]] = 0
        if min_p > 0:
            weights[scaled < math.log(min_p) + nudge] = 0
        ends = np.cumsum(weights)
        slack = SLACK * ends[-1]
        is_near = (ends - weights - slack <= uniform * ends[-1]) & (uniform * ends[-1] <= ends + slack) & (weights > 0)
        found |= set(np.nonzero(is_near)[0].tolist())
    return found


PARAMETERS: dict[str, list[float]] = {
    "temperature": [1.0, 0.7, 1e-5, 100.0, 1e-44],
    "top_k": [0, 1, 5, 40, 0, 3000, 10**9],
    "top_p": [1.0, 0.9, 1e-6, 0.999, 0.5],
    "min_p": [0.0, 0.0, 0.05, 1.0],
}


def mixed(count: int, **changes: Any) -> SampledRows:
    """Rows with all parameters, in different company each."""
    cycles = {name: np.resize(values, count) for name, values in PARAMETERS.items()}
    return rows(count, seeds=np.arange(count) * 1_000_003, positions=np.arange(count) * 2**31, **(cycles | changes))


@pytest.mark.parametrize("vocab_size", [1, 5, 16, 255, 257, 4096, 5003, 49152])
def test_tokens_are_those_of_the_reference(library: Any, isa: int, vocab_size: int, random: np.random.Generator) -> None:
    """The reference in torch differs too where a draw is at a border: there either token will do, elsewhere none but its own."""
    count = 140 if vocab_size < 10_000 else 20
    scales = 10.0 ** random.uniform(-2, 1, (count, 1))
    logits = (random.standard_normal((count, vocab_size)) * scales).astype(np.float32)
    asked = mixed(count)
    found = draw(library, isa, logits, asked)
    expected = draw_tokens(torch.from_numpy(logits), asked, np.arange(count))
    at_border = 0
    for row in np.nonzero(found != expected)[0]:
        numbers = (float(asked.temperature[row]), int(asked.top_k[row]), float(asked.top_p[row]), float(asked.min_p[row]))
        uniform = float(uniforms(asked.seeds[row : row + 1], asked.positions[row : row + 1])[0])
        assert int(found[row]) in possible(logits[row], *numbers, uniform), (row, numbers)
        at_border += 1
    assert at_border <= count // 20


@pytest.mark.parametrize("vocab_size", [17, 300, 49152])
def test_what_is_ruled_out_is_never_drawn(library: Any, isa: int, vocab_size: int, random: np.random.Generator) -> None:
    count = 140
    logits = np.full((count, vocab_size), -np.inf, np.float32)
    only = random.integers(0, vocab_size, count)
    logits[np.arange(count), only] = random.standard_normal(count) * 50
    assert draw(library, isa, logits, mixed(count)).tolist() == only.tolist()


def test_a_third_of_a_row_is_ruled_out(library: Any, isa: int, random: np.random.Generator) -> None:
    logits = random.standard_normal((700, 1000)).astype(np.float32)
    logits[:, ::3] = -np.inf
    assert (draw(library, isa, logits, mixed(700)) % 3 != 0).all()


@pytest.mark.parametrize("parameters", [{"top_k": 2}, {"top_p": 0.3}, {"top_k": 3, "top_p": 0.1}, {"min_p": 1.0}], ids=str)
def test_ties_at_the_border_are_all_kept(library: Any, isa: int, parameters: dict[str, float]) -> None:
    """Six tokens tie as the likeliest, in different blocks; one that is less likely is never drawn."""
    logits = np.full(2000, -1.0, np.float32)
    tied = [0, 15, 16, 700, 1023, 1999]
    logits[tied] = 4.0
    found = draw(library, isa, np.tile(logits, (600, 1)), rows(600, **parameters))
    assert set(found.tolist()) == set(tied)


def test_ties_below_the_likeliest_are_kept_with_the_last(library: Any, isa: int) -> None:
    logits = np.array([3.0, 1.0, 2.0, 2.0, 0.0, 2.0], np.float32)
    for parameters in ({"top_k": 2}, {"top_p": 0.6}):
        found = draw(library, isa, np.tile(logits, (600, 1)), rows(600, **parameters))
        assert set(found.tolist()) == {0, 2, 3, 5}


def test_limits_keep_everything(library: Any, isa: int, random: np.random.Generator) -> None:
    logits = random.standard_normal((64, 1000)).astype(np.float32)
    plain = draw(library, isa, logits, rows(64)).tolist()
    for parameters in ({"top_k": 1000}, {"top_k": 2**31 - 1}, {"top_p": 1.0}, {"min_p": 0.0}, {"min_p": 1e-40}):
        assert draw(library, isa, logits, rows(64, **parameters)).tolist() == plain


@pytest.mark.parametrize("parameters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-38}], ids=str)
def test_limits_keep_the_likeliest_alone(library: Any, isa: int, parameters: dict[str, float], random: np.random.Generator) -> None:
    logits = (random.standard_normal((64, 1000)) * 100).astype(np.float32)
    assert draw(library, isa, logits, rows(64, **parameters)).tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("parameters", "power", "kept"),
    [
        ({}, 1.0, range(40)),
        ({"temperature": 2.0}, 0.5, range(40)),
        ({"top_k": 7}, 1.0, range(7)),
        ({"min_p": 0.5}, 1.0, range(20)),
    ],
    ids=["plain", "temperature", "top_k", "min_p"],
)
def test_tokens_follow_the_distribution(
    library: Any, isa: int, parameters: dict[str, float], power: float, kept: range, random: np.random.Generator
) -> None:
    """Chi-square with at most 39 degrees of freedom; 100 is passed by chance less than once in 10⁶. Tokens stand anywhere."""
    count, vocab_size = 10_000, 600
    probabilities = 1.0 - np.arange(40) / 39.5
    places = random.permutation(vocab_size)[:40]
    logits = np.full(vocab_size, -np.inf, np.float32)
    logits[places] = np.log(probabilities)
    found = draw(library, isa, np.broadcast_to(logits, (count, vocab_size)).copy(), rows(count, **parameters))
    wanted = probabilities[kept] ** power
    wanted *= count / wanted.sum()
    counts = np.bincount(found, minlength=vocab_size)[places]
    assert counts.sum() == counts[kept].sum() == count
    assert ((counts[kept] - wanted) ** 2 / wanted).sum() < 100


def test_a_rows_token_does_not_depend_on_its_batch(library: Any, isa: int, random: np.random.Generator) -> None:
    """Alone, in other company, in a wider array, and drawn again in the same memory."""
    count, vocab_size = 70, 3001
    wide = (random.standard_normal((count, vocab_size + 37)) * 3).astype(np.float32)
    wide[:, vocab_size:] = np.nan
    asked = mixed(count)
    logits = torch.from_numpy(wide)[:, :vocab_size]
    native = NativeDraw(library, vocab_size, isa=isa)
    together = native(logits, asked, np.arange(count))
    some = np.array([3, 4, 50, 69])
    assert native(logits, asked, some).tolist() == together[some].tolist()
    for row in range(0, count, 7):
        names = ("slots", "positions", "temperature", "top_k", "top_p", "min_p", "seeds")
        own = SampledRows(**{name: getattr(asked, name)[row : row + 1].copy() for name in names})
        alone = draw(library, isa, wide[row : row + 1, :vocab_size].copy(), own)
        assert alone[0] == together[row]


def test_logits_are_left_as_they_are(library: Any, isa: int, random: np.random.Generator) -> None:
    logits = random.standard_normal((35, 1000)).astype(np.float32)
    before = logits.copy()
    draw(library, isa, logits, mixed(35))
    assert np.array_equal(logits, before)
