"""How one instance of a stage is chosen among those that can serve a request. Pure and small; a policy is a function.

A policy sees how much each candidate holds and how much it was ever given, and returns the index of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy knows of an instance."""

    num_open: int
    num_taken: int


Policy = Callable[[Sequence[Candidate]], int]


def least_loaded(candidates: Sequence[Candidate]) -> int:
    """The one with the least open work; among equals the one that was given least, so that a newcomer gets work at once."""
    return min(range(len(candidates)), key=lambda index: (candidates[index].num_open, candidates[index].num_taken))


def round_robin(candidates: Sequence[Candidate]) -> int:
    """The one that was given least so far: turns, whatever the load."""
    return min(range(len(candidates)), key=lambda index: candidates[index].num_taken)


POLICIES: dict[str, Policy] = {"least_loaded": least_loaded, "round_robin": round_robin}
