"""How often proposals are right, measured for each sequence and each grade of proposal.

Every token that a proposal and the model both gave is a trial, also where the proposal was not verified: so a sequence whose text
begins to repeat itself is noticed without spending a single draft on it. Recent trials weigh more. A sequence of which little is
known is taken to be like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_KEPT: Final = 0.95
"""Weight that a sequence's trials keep with each later result: it remembers about twenty."""
_KEPT_OF_ALL: Final = 0.995
_PRIOR_TRIALS: Final = 6.0
"""Trials that the rate of all sequences counts as beside a sequence's own."""
_FIRST_TRIALS: Final = 8.0
"""Trials that a drafter's own expectation counts as beside those of all sequences."""


class _Trials:
    """Right tokens and trials, both weighted."""

    __slots__ = ("num_right", "num_trials")

    def __init__(self, num_right: float = 0.0, num_trials: float = 0.0) -> None:
        self.num_right = num_right
        self.num_trials = num_trials

    def add(self, num_right: int, num_trials: int, kept: float) -> None:
        self.num_right = self.num_right * kept + num_right
        self.num_trials = self.num_trials * kept + num_trials


class AcceptanceRates:
    """Measured rates.

    Args:
        first_rates: Expected before anything is measured, one a grade.
    """

    def __init__(self, first_rates: Sequence[float]) -> None:
        self._first_rates = tuple(first_rates)
        self._all = [_Trials() for _ in first_rates]
        self._by_slot: dict[int, dict[int, _Trials]] = {}

    def enter(self, slot: int) -> None:
        """A slot has a new sequence."""
        self._by_slot.pop(slot, None)

    def rate(self, slot: int, grade: int) -> float:
        """The share of tokens that a proposal of this grade will probably have right, each after right ones."""
        everyone = self._all[grade]
        expected = (everyone.num_right + self._first_rates[grade] * _FIRST_TRIALS) / (everyone.num_trials + _FIRST_TRIALS)
        own = self._by_slot.get(slot, {}).get(grade)
        if own is None:
            return expected
        return (own.num_right + expected * _PRIOR_TRIALS) / (own.num_trials + _PRIOR_TRIALS)

    def record(self, slot: int, grade: int, *, proposed: Sequence[int], sampled: Sequence[int]) -> None:
        """The model has sampled these tokens where those were proposed."""
        num_trials = min(len(proposed), len(sampled))
        num_right = next((place for place in range(num_trials) if proposed[place] != sampled[place]), num_trials)
        # After the first wrong token nothing more was tried.
        num_trials = min(num_trials, num_right + 1)
        self._all[grade].add(num_right, num_trials, _KEPT_OF_ALL)
        self._by_slot.setdefault(slot, {}).setdefault(grade, _Trials()).add(num_right, num_trials, _KEPT)
