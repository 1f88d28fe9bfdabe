"""An order by a number that each sequence gets when it begins to wait."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from services.scheduler.sequence import Sequence


class ByKey:
    """The smallest key first; among equals the order of arrival."""

    takes_back = False

    def __init__(self, key: Callable[[Sequence], float]) -> None:
        self._key = key
        self._num_added = 0
        self._held: dict[Sequence, int] = {}
        # Entries are (key, arrival, sequence); those of sequences that have left are dropped when they come to the top.
        self._heap: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._held)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence."""
        self._num_added += 1
        self._held[sequence] = self._num_added
        heapq.heappush(self._heap, (self._key(sequence), self._num_added, sequence))

    def peek(self) -> Sequence | None:
        """The one with the smallest key."""
        while self._heap:
            _, arrival, sequence = self._heap[0]
            if self._held.get(sequence) == arrival:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is held."""
        del self._held[sequence]
        # Sequences that leave from the middle must not pile up.
        if len(self._heap) > 2 * len(self._held) + 16:
            self._heap = [entry for entry in self._heap if self._held.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
