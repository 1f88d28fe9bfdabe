"""How long outputs become: measured on those that have ended, asked of those that run.

A sequence that has made k tokens ends where one of the recent outputs of more than k tokens ended, or at its own limit. Which one
is a draw that each sequence keeps: so what is expected follows the traffic and the sequence's own age, and not all are expected to
end at the same time, as they would be by their mean.

Source: predicting from the history of output lengths, the Past-Future scheduler (ASPLOS 2025).
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

HISTORY_MAX: Final = 1000
"""Outputs remembered; older ones are forgotten."""
HISTORY_MIN: Final = 32
"""With fewer the guess is `PRIOR_SHARE` of what a sequence may still make, of which no more than `PRIOR_TOKENS_MAX` are counted."""
PRIOR_SHARE: Final = 0.7
PRIOR_TOKENS_MAX: Final = 512
_REBUILD_EVERY: Final = 32


class LengthEstimate(Protocol):
    """Says how long outputs will become."""

    def record(self, num_output_tokens: int) -> None:
        """An output has come to its own end."""
        ...

    def expected(self, made: Int64Array, limits: Int64Array, draws: Float64Array) -> Float64Array:
        """Expected whole length of each output, at least what it has and at most its limit, tokens.

        Args:
            made: `[n]`, output tokens so far.
            limits: `[n]`, most output tokens.
            draws: `[n]`, from 0 to below 1: where among the possible lengths each is.
        """
        ...

    @property
    def longest(self) -> int | None:
        """No output is expected to be longer than this, tokens, unless it is so already; None while that is not known."""
        ...


class OutputLengths:
    """The lengths of recent outputs, given what has been made."""

    def __init__(self) -> None:
        self._history: deque[int] = deque(maxlen=HISTORY_MAX)
        self._num_new = 0
        self._sorted = np.zeros(0, dtype=np.int64)

    def record(self, num_output_tokens: int) -> None:
        """Take a length in."""
        self._history.append(num_output_tokens)
        self._num_new += 1
        if self._num_new >= _REBUILD_EVERY and len(self._history) >= HISTORY_MIN:
            self._num_new = 0
            self._sorted = np.sort(np.fromiter(self._history, dtype=np.int64))

    def expected(self, made: Int64Array, limits: Int64Array, draws: Float64Array) -> Float64Array:
        """Expected whole lengths; see `LengthEstimate`."""
        if not len(self._sorted):
            guess: Float64Array = made + PRIOR_SHARE * np.minimum(limits - made, PRIOR_TOKENS_MAX)
            return guess
        num_known = len(self._sorted)
        places = np.searchsorted(self._sorted, made, side="right")
        drawn = self._sorted[np.minimum(places + (draws * (num_known - places)).astype(np.int64), num_known - 1)]
        # One that is longer than all before it may go on for as long again.
        found: Float64Array = np.minimum(np.where(places == num_known, 2.0 * made, drawn), limits)
        return found

    @property
    def longest(self) -> int | None:
        """The longest recent output."""
        return int(self._sorted[-1]) if len(self._sorted) else None
