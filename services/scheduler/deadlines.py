"""Which requests' deadlines have passed, and which cannot be met any more."""

from __future__ import annotations

import heapq
import math
from collections.abc import Container


class BestSpeed:
    """The fastest that the lanes have been: no request can be served faster, so a deadline nearer than that is lost already."""

    def __init__(self) -> None:
        self._step_ns = math.inf
        self._token_ns = math.inf

    def record(self, num_tokens: int, duration_ns: int) -> None:
        """A step computed that many tokens in that time at its worker."""
        if num_tokens > 0 and duration_ns > 0:
            self._step_ns = min(self._step_ns, duration_ns)
            self._token_ns = min(self._token_ns, duration_ns / num_tokens)

    def least_ns(self, num_prompt_tokens: int, num_steps: int) -> int:
        """Time that a prompt and the steps of its outputs take at least; zero before the first step.

        Args:
            num_prompt_tokens: Tokens to be computed before the first output.
            num_steps: Steps that give outputs, at least 1: the prompt's last gives the first.
        """
        if self._step_ns == math.inf:
            return 0
        return int(max(self._step_ns, self._token_ns * num_prompt_tokens) + self._step_ns * (num_steps - 1))


class Deadlines:
    """Deadlines of live requests, on whatever clock the caller uses: a heap, cleaned of requests that ended before theirs."""

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
