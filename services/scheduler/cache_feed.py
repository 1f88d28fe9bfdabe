"""Who follows the caches of the lanes, and what each has to be told: a snapshot first, then every change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from services.scheduler.cache_events import CacheEvent, CacheLog, EventKind
from services.scheduler.lane import Lane
from services.scheduler.lanes import Lanes


@dataclass(frozen=True, slots=True)
class CacheNews:
    """What happened in one lane's cache.

    Attributes:
        lane_id: Which.
        page_size: Tokens a block; 0 of a lane that is gone.
        first_number: Number of the first event; of a snapshot, that of the first event after it.
        events: In order; those of a snapshot store everything, and that of a lane that is gone has none.
        is_snapshot: What was known of the lane before is to be forgotten.
        with_tokens: Whether the receiver wants the blocks' tokens.
    """

    lane_id: int
    page_size: int
    first_number: int
    events: tuple[CacheEvent, ...]
    is_snapshot: bool = False
    with_tokens: bool = False


class CacheFeed:
    """The subscribers, each with the lanes of which it needs a snapshot; some of them may be gone."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._subscribers: dict[int, set[int]] = {}
        self._token_readers: set[int] = set()
        self._watched: dict[int, Lane] = {}

    def subscribe(self, owner: int, *, with_tokens: bool = False) -> None:
        """Somebody wants to know from now on, beginning with snapshots; again, when something was missed or more is wanted."""
        if with_tokens:
            self._token_readers.add(owner)
        else:
            self._token_readers.discard(owner)
        # Lanes that are gone and of which it could not yet be told stay due.
        self._subscribers.setdefault(owner, set()).update(lane.lane_id for lane in self._lanes)

    def unsubscribe(self, owner: int) -> None:
        """Somebody is gone. With the last one nothing is recorded any more."""
        self._subscribers.pop(owner, None)
        self._token_readers.discard(owner)
        if not self._subscribers:
            for lane in self._watched.values():
                lane.kv.tree.log = None
            self._watched.clear()

    def missed(self, owner: int, lane_id: int) -> None:
        """News could not be sent: a snapshot makes up for them."""
        if owner in self._subscribers:
            self._subscribers[owner].add(lane_id)

    def collect(self) -> Iterator[tuple[int, CacheNews]]:
        """News since the last call, and whom they are for."""
        if not self._subscribers:
            return
        present = {lane.lane_id for lane in self._lanes}
        for lane_id in self._watched.keys() - present:
            del self._watched[lane_id]
            for wanted in self._subscribers.values():
                wanted.add(lane_id)
        for owner, wanted in self._subscribers.items():
            for lane_id in wanted - present:
                wanted.discard(lane_id)
                yield owner, CacheNews(lane_id, 0, 0, (), is_snapshot=True)
        for lane in self._lanes:
            yield from self._of(lane)

    def _of(self, lane: Lane) -> Iterator[tuple[int, CacheNews]]:
        lane_id, page_size, tree = lane.lane_id, lane.capacity.page_size, lane.kv.tree
        log = tree.log
        if log is None:
            log = tree.log = CacheLog()
        if lane_id not in self._watched:
            self._watched[lane_id] = lane
            for wanted in self._subscribers.values():
                wanted.add(lane_id)
        taken = log.take()
        snapshot: CacheNews | None = None
        for owner, wanted in self._subscribers.items():
            if taken is None or lane_id in wanted:
                wanted.discard(lane_id)
                if snapshot is None:
                    # One without hashes is of a cache that is empty.
                    stored = tuple(tree.snapshot()) or (CacheEvent(EventKind.STORED),)
                    snapshot = CacheNews(lane_id, page_size, log.next_number, stored, is_snapshot=True)
                yield owner, replace(snapshot, with_tokens=owner in self._token_readers)
            elif taken[1]:
                news = CacheNews(lane_id, page_size, taken[0], tuple(taken[1]), with_tokens=owner in self._token_readers)
                yield owner, news
