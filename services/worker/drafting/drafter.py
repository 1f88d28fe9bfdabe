"""What guesses the tokens that the model will sample next, so that it can verify several in one pass.

A drafter proposes; the model decides. For each row a step samples a token at every place, by the place's own logits and its own
random number, as if nothing had been guessed; drafts stand as long as they are what was sampled. So the output is the same, token
by token, with any drafter and with none, for greedy and for sampled requests, and no drafter has to know how its guesses are
distributed.

One file an algorithm; `factory.py` chooses. A drafter that is a model itself computes the proposals of all rows in one pass of
its own, which is why it is asked for all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guesses for one row.

    Attributes:
        token_ids: The tokens that may follow; at least one.
        grade: How good the guess looks, an index of the drafter's `first_rates`: how often those of a grade are right is measured.
    """

    token_ids: list[int]
    grade: int


@dataclass(frozen=True, slots=True)
class Drafts:
    """Guesses that a step verifies; arrays in parallel.

    Attributes:
        slots: Slots of the rows that carry drafts.
        counts: How many each carries, at least 1.
        token_ids: The drafts, flat.
    """

    slots: Int64Array
    counts: Int64Array
    token_ids: Int64Array


class Drafter(Protocol):
    """One way of guessing. Called on the compute thread only."""

    first_rates: tuple[float, ...]
    """For each grade, the share of tokens that will probably be right, before any is measured."""

    def enter(self, slot: int, token_ids: Int32Array, foretold: Int32Array) -> None:
        """A sequence enters a slot; what was known of the slot's former one is over.

        Args:
            slot: Which.
            token_ids: Its tokens, prompt and outputs so far.
            foretold: Tokens that came after the same tokens in an earlier sequence; may be none.
        """
        ...

    def extend(self, slot: int, token_ids: list[int]) -> None:
        """The model has sampled these tokens for a sequence."""
        ...

    def propose(self, slots: Sequence[int], max_num_drafts: int) -> list[Proposal | None]:
        """Guess what comes next in these slots' sequences, so many tokens at most; None where there is nothing to say."""
        ...

    def reset(self) -> None:
        """Forget every sequence."""
        ...
