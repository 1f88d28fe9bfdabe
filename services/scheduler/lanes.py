"""All lanes under one scheduler, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from services.scheduler.lane import Lane
from services.scheduler.radix_tree import Match, Node
from services.scheduler.sequence import Sequence


class Lanes:
    """The worker groups that have joined."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}
        self._num_changes = 0

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def get(self, lane_id: int) -> Lane | None:
        """The lane of that worker life, or None."""
        return self._lanes.get(lane_id)

    def add(self, lane: Lane) -> None:
        """A lane joins."""
        self._num_changes += 1
        self._lanes[lane.lane_id] = lane

    def remove(self, lane_id: int) -> Lane | None:
        """A lane is lost."""
        lane = self._lanes.pop(lane_id, None)
        if lane is not None:
            # Its part of `cache_version` stays counted, so that no number comes twice.
            self._num_changes += 1 + lane.kv.tree.num_inserted
        return lane

    def choose(self, sequence: Sequence, can_enter: Callable[[Lane, Sequence, Match], bool]) -> tuple[Lane, Match] | None:
        """The lane for a sequence, with the prefix it has there, among the lanes that can take it now; None when none can.

        The least load wins, where each token of the sequence that is cached on a lane outweighs one of its load.
        """
        able = [(lane, match) for lane in self if can_enter(lane, sequence, match := lane.kv.match(sequence))]
        return min(able, key=lambda found: found[0].num_tokens - found[1].num_pages * found[0].kv.pool.page_size, default=None)

    def has_free_slot(self) -> bool:
        """Whether any lane has a slot to give."""
        return any(lane.slots.num_free for lane in self)

    def longest_prefix(self, sequence: Sequence) -> tuple[Node | None, int]:
        """The most of the sequence that any lane has cached: the node where it ends, and its tokens."""
        found: tuple[Node | None, int] = (None, 0)
        for lane in self:
            match = lane.kv.match(sequence)
            num_tokens = match.num_pages * lane.kv.pool.page_size
            if num_tokens > found[1]:
                found = (match.node, num_tokens)
        return found

    def cache_version(self) -> int:
        """Changes when a prefix is added to a lane's cache. Eviction does not count: it makes an order worse, not wrong."""
        return self._num_changes + sum(lane.kv.tree.num_inserted for lane in self)

    def largest_prompt(self) -> int:
        """Most tokens with which a sequence can enter any lane."""
        return max((lane.capacity.max_prompt_tokens for lane in self), default=0)
