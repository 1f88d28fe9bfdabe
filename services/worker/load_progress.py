"""How far loading is: decides when to say so again. Told the time."""

from __future__ import annotations

from typing import Final

INTERVAL_S: Final = 1.0
"""Time between two lines, at least."""


class LoadProgress:
    """Adds up what has been read.

    Args:
        now_s: When loading began.
    """

    def __init__(self, now_s: float) -> None:
        self._num_read = 0
        self._told_s = now_s

    def add(self, num_values: int, num_in_all: int, now_s: float) -> int | None:
        """Count values of a tensor.

        Args:
            num_values: Those read since the last call.
            num_in_all: Those of all tensors.
            now_s: Monotonic clock, seconds.

        Returns:
            Percentage to tell; None when the last time was less than `INTERVAL_S` ago.
        """
        self._num_read += num_values
        if now_s - self._told_s < INTERVAL_S:
            return None
        self._told_s = now_s
        return self._num_read * 100 // max(1, num_in_all)
