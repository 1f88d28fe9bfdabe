"""How long outputs become: measured on those that have ended, asked of those that run.

A sequence that has made k tokens is expected to end where recent outputs of more than k tokens ended on average, or at its own
limit. So what is expected follows the traffic, and the sequence's own age.

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
PRIOR_TOKENS_MAX: Final = 4096
_REBUILD_EVERY: Final = 32


class LengthEstimate(Protocol):
    """Says how long outputs will become."""

    def record(self, num_output_tokens: int) -> None:
        """An output has come to its own end."""
        ...

    def expected(self, made: Int64Array, limits: Int64Array) -> Float64Array:
        """Expected whole length of each output, at least what it has and at most its limit, tokens.

        Args:
            made: `[n]`, output tokens so far.
            limits: `[n]`, most output tokens.
        """
        ...

    @property
    def longest(self) -> int | None:
        """No output is expected to be longer than this, tokens, unless it is so already; None while that is not known."""
        ...


class OutputLengths:
    """The mean length of recent outputs, given what has been made."""

    def __init__(self) -> None:
        self._history: deque[int] = deque(maxlen=HISTORY_MAX)
        self._num_new = 0
        self._sorted = np.zeros(0, dtype=np.int64)
        # Mean of the sorted lengths from each index on.
        self._means_above = np.zeros(0, dtype=np.float64)

    def record(self, num_output_tokens: int) -> None:
        """Take a length in."""
        self._history.append(num_output_tokens)
        self._num_new += 1
        if self._num_new >= _REBUILD_EVERY and len(self._history) >= HISTORY_MIN:
            self._num_new = 0
            self._sorted = np.sort(np.fromiter(self._history, dtype=np.int64))
            counts = np.arange(len(self._sorted), 0, -1)
            self._means_above = np.cumsum(self._sorted[::-1])[::-1] / counts

    def expected(self, made: Int64Array, limits: Int64Array) -> Float64Array:
        """Expected whole lengths; see `LengthEstimate`."""
        if not len(self._sorted):
            guess: Float64Array = made + PRIOR_SHARE * np.minimum(limits - made, PRIOR_TOKENS_MAX)
            return guess
        places = np.searchsorted(self._sorted, made, side="right")
        # One that is longer than all before it may go on for as long again.
        is_longest = places == len(self._sorted)
        means = self._means_above[np.minimum(places, len(self._sorted) - 1)]
        found: Float64Array = np.minimum(np.where(is_longest, 2.0 * made, means), limits)
        return found

    @property
    def longest(self) -> int | None:
        """The longest recent output."""
        return int(self._sorted[-1]) if len(self._sorted) else None
