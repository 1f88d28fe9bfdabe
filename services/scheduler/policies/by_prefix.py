"""Orders that look at what the lanes have cached: the ground of `lpm` and `dfs-weight`.

Looking up a prefix costs microseconds, so only the oldest `WINDOW` sequences are ordered, and only when something was added to a
cache or to the window. An order by prefix would let sequences without one wait for ever while others with one keep coming: one that
has been overtaken `OVERTAKEN_MAX` times goes next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Final

from services.scheduler.lanes import Lanes
from services.scheduler.sequence import Sequence

WINDOW: Final = 128
OVERTAKEN_MAX: Final = 512


class ByPrefix(ABC):
    """An order over the oldest that wait, made anew when the caches have changed."""

    takes_back = False

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        # Each with the number that had been admitted before it came.
        self._waiting: OrderedDict[Sequence, int] = OrderedDict()
        self._num_removed = 0
        # The next one is at the end; empty when it has to be made.
        self._order: list[Sequence] = []
        self._version = -1

    @abstractmethod
    def rank(self, window: list[Sequence]) -> list[Sequence]:
        """Order the sequences, given in the order of arrival; the first goes next."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence."""
        if len(self._waiting) < WINDOW:
            self._order = []
        self._waiting[sequence] = self._num_removed

    def peek(self) -> Sequence | None:
        """The first of the order, or the oldest of all if it has been overtaken too often."""
        oldest = next(iter(self._waiting), None)
        if oldest is None or self._num_removed - self._waiting[oldest] >= OVERTAKEN_MAX:
            return oldest
        version = self._lanes.cache_version()
        if not self._order or version != self._version:
            self._version = version
            self._order = self.rank(list(islice(self._waiting, WINDOW)))
            self._order.reverse()
        return self._order[-1]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is held."""
        del self._waiting[sequence]
        self._num_removed += 1
        if self._order and self._order[-1] is sequence:
            self._order.pop()
        else:
            self._order = []
