"""What steps of one kind took lately, and what is believed of it. Told times, reads no clock."""

from __future__ import annotations

from collections import deque
from typing import Final

NUM_TRIES: Final = 3
"""Measurements before they are believed: the first step of a kind may prepare kernels."""
_NUM_KEPT: Final = 16


class LatestTimes:
    """The latest measurements of one kind; their lower quartile counts, for whatever interrupts a step makes it longer.

    Args:
        lasting_steps: Steps after which those kept are replaced by what comes, instead of being joined; None for never.

    Attributes:
        num_seen: Measurements so far.
        last_step: Number of the step that was measured last.
    """

    __slots__ = ("_lasting_steps", "_latest_ns", "_time_ns", "last_step", "num_seen")

    def __init__(self, lasting_steps: int | None = None) -> None:
        self._lasting_steps = lasting_steps
        self._latest_ns: deque[float] = deque(maxlen=_NUM_KEPT)
        self._time_ns: float | None = None
        self.num_seen = 0
        self.last_step = 0

    @property
    def is_known(self) -> bool:
        """Whether there are enough to be believed."""
        return self.num_seen >= NUM_TRIES

    @property
    def time_ns(self) -> float:
        """The time to expect, nanoseconds; 0 while nothing was measured."""
        # Few of those who add ask.
        if self._time_ns is None:
            self._time_ns = sorted(self._latest_ns)[len(self._latest_ns) // 4] if self._latest_ns else 0.0
        return self._time_ns

    def add(self, time_ns: float, step: int) -> None:
        """A step of that number took that long."""
        if self._lasting_steps is not None and step - self.last_step > self._lasting_steps:
            self._latest_ns.clear()
        self.num_seen += 1
        self.last_step = step
        self._latest_ns.append(time_ns)
        self._time_ns = None
