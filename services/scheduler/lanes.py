"""All lanes under one scheduler, and the choice among them.

With many lanes a choice looks at some only: those that lately took a sequence with the same beginning, and others in turn. The best
of two dozen is hardly worse than the best of a thousand, and found in a fraction of the time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Final

from services.scheduler.lane import Lane
from services.scheduler.radix_tree import Match, Node
from services.scheduler.sequence import Sequence

LOOKED_AT_MAX: Final = 32
"""Up to so many lanes all are looked at for each sequence; of more, so many."""
TAKERS_MAX: Final = 8
BEGINNINGS_MAX: Final = 10_000
BEGINNING_TOKENS: Final = 32


class Lanes:
    """The worker groups that have joined."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}
        self._ids: list[int] = []
        self._num_changes = 0
        self._turn = 0
        # By the first tokens, the lanes that took the latest sequences with them; the entry used last is at the end.
        self._takers: OrderedDict[tuple[str, bytes], OrderedDict[Lane, None]] = OrderedDict()

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
        self._ids = list(self._lanes)

    def remove(self, lane_id: int) -> Lane | None:
        """A lane is lost."""
        lane = self._lanes.pop(lane_id, None)
        self._ids = list(self._lanes)
        if lane is not None:
            # Its part of `cache_version` stays counted, so that no number comes twice.
            self._num_changes += 1 + lane.kv.tree.num_inserted
        return lane

    def choose(
        self,
        sequence: Sequence,
        can_enter: Callable[[Lane, Sequence, Match], bool],
        among: Collection[Lane] | None = None,
    ) -> tuple[Lane, Match] | None:
        """The lane for a sequence, with the prefix it has there, among the lanes that can take it now; None when none can.

        The least load wins, where each token of the sequence that is cached on a lane outweighs one of its load.

        Args:
            sequence: Which waits.
            can_enter: Whether a lane can take it, with the prefix found there.
            among: The lanes to look at; None for all, or a good choice of them where they are many.
        """
        if among is None and len(self._lanes) > LOOKED_AT_MAX:
            choice = self.choose(sequence, can_enter, self._some(sequence))
            if choice is not None:
                return choice
        looked_at = self if among is None else among
        found = [(lane, lane.kv.match(sequence)) for lane in looked_at if lane.slots.num_free]
        found.sort(key=lambda one: one[0].num_tokens - one[1].num_pages * one[0].kv.pool.page_size)
        # Whether one can enter may take long to say, so the best is asked first.
        return next(((lane, match) for lane, match in found if can_enter(lane, sequence, match)), None)

    def took(self, lane: Lane, sequence: Sequence) -> None:
        """A lane took a sequence: it is worth a look for the next that begins like it."""
        if len(self._lanes) <= LOOKED_AT_MAX:
            return
        key = _beginning(sequence)
        takers = self._takers.setdefault(key, OrderedDict())
        takers[lane] = None
        takers.move_to_end(lane)
        if len(takers) > TAKERS_MAX:
            takers.popitem(last=False)
        self._takers.move_to_end(key)
        if len(self._takers) > BEGINNINGS_MAX:
            self._takers.popitem(last=False)

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

    def _some(self, sequence: Sequence) -> list[Lane]:
        """Lanes worth a look: those that took its like, and others in turn."""
        takers = self._takers.get(_beginning(sequence), ())
        some = [lane for lane in takers if self._lanes.get(lane.lane_id) is lane]
        for _ in range(LOOKED_AT_MAX - len(some)):
            self._turn = (self._turn + 1) % len(self._ids)
            some.append(self._lanes[self._ids[self._turn]])
        return some

    def most_drafts(self) -> int:
        """Most drafts that any lane verifies in a row of a step."""
        return max((lane.capacity.max_num_drafts for lane in self), default=0)

    def largest_prompt(self) -> int:
        """Most tokens with which a sequence can enter any lane."""
        return max((lane.capacity.max_prompt_tokens for lane in self), default=0)


def _beginning(sequence: Sequence) -> tuple[str, bytes]:
    return sequence.namespace, sequence.tokens[:BEGINNING_TOKENS].tobytes()
