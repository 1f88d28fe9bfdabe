"""Which requests' deadlines have passed: a heap of (deadline, request id), cleaned of requests that ended before theirs."""

from __future__ import annotations

import heapq
from collections.abc import Container


class Deadlines:
    """Deadlines of live requests, on whatever clock the caller uses."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []

    def add(self, request_id: str, deadline_ns: int, live: Container[str], num_live: int) -> None:
        """Watch a deadline. `live` tells which requests still matter; the rest are cleaned out when they are the greater part."""
        if len(self._heap) > 64 + 2 * num_live:
            self._heap = [entry for entry in self._heap if entry[1] in live]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (deadline_ns, request_id))

    def take_due(self, now_ns: int) -> list[str]:
        """Requests whose deadline is not after `now_ns`; some may have ended long ago."""
        due = []
        while self._heap and self._heap[0][0] <= now_ns:
            due.append(heapq.heappop(self._heap)[1])
        return due

    def next_ns(self, live: Container[str]) -> int | None:
        """The earliest deadline of a request in `live`, or None."""
        while self._heap and self._heap[0][1] not in live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
