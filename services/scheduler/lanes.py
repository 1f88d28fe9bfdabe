"""All lanes under one scheduler, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator

from services.scheduler.lane import Lane
from services.scheduler.radix_tree import Match
from services.scheduler.sequence import Sequence


class Lanes:
    """The worker groups that have joined."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def get(self, lane_id: int) -> Lane | None:
        """The lane of that worker life, or None."""
        return self._lanes.get(lane_id)

    def add(self, lane: Lane) -> None:
        """A lane joins."""
        self._lanes[lane.lane_id] = lane

    def remove(self, lane_id: int) -> Lane | None:
        """A lane is lost."""
        return self._lanes.pop(lane_id, None)

    def choose(self, sequence: Sequence) -> tuple[Lane, Match] | None:
        """The lane for a sequence, with the prefix it has there, among the lanes that can admit it now; None when none can.

        The least load wins, where each token of the sequence that is cached on a lane outweighs one of its load.
        """
        able = [(lane, match) for lane in self if lane.can_admit(sequence, match := lane.kv.match(sequence))]
        return min(able, key=lambda found: found[0].num_tokens - found[1].num_pages * found[0].kv.pool.page_size, default=None)

    def largest_prompt(self) -> int:
        """Most tokens with which a sequence can enter any lane."""
        return max((lane.capacity.max_prompt_tokens for lane in self), default=0)
