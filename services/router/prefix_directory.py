"""What the schedulers' lanes have cached, as they tell it: how much of a prompt need not be computed where.

Blocks are known by their chained hashes (`block_hashes`); a prompt is looked up block by block until one is missing. What is known
may be a little old, and costs nothing but time when it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

STORED, REMOVED, CLEARED = 1, 2, 3
CACHE_LOAD_SLACK: Final = 8
"""A scheduler that has more requests than the least busy one and this is not chosen for its cache."""

BLOCKS_MAX: Final = 1_000_000
"""Blocks remembered of a lane. Of one that has more cached, some are not known, and count as not cached."""

_HASH_BYTES: Final = 8
_TOKEN_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class CachePrompt:
    """What is looked up.

    Attributes:
        tokens: The prompt as little-endian int32.
        namespace: Prefixes are shared only inside one.
    """

    tokens: bytes
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class LaneNews:
    """What a scheduler tells of one lane: kinds of events with the hashes of each.

    Attributes:
        lane_id: Which.
        page_size: Tokens a block; 0 of a lane that is gone.
        first_number: Number of the first event; of a snapshot, that of the first event after it.
        events: Kind and block hashes, in order; a snapshot without any is of a lane that is gone.
        is_snapshot: What was known before is to be forgotten.
        has_tokens: Whether the tokens of stored blocks came with them.
        parents: With tokens, the hash that the first block of each event is chained to.
        tokens: Those of all stored blocks, one after another, int32, little-endian.
    """

    lane_id: int
    page_size: int
    first_number: int
    events: tuple[tuple[int, tuple[int, ...]], ...]
    is_snapshot: bool
    has_tokens: bool = False
    parents: tuple[int, ...] = ()
    tokens: bytes = b""


@dataclass(slots=True)
class _LaneView:
    page_size: int
    next_number: int
    blocks: set[int] = field(default_factory=set)


class PrefixDirectory:
    """Cached blocks by scheduler and lane."""

    def __init__(self) -> None:
        self._schedulers: dict[int, dict[int, _LaneView]] = {}

    def update(self, scheduler: int, news: LaneNews) -> bool:
        """Take news in; False when some were missed before: a snapshot is needed."""
        lanes = self._schedulers.setdefault(scheduler, {})
        if news.is_snapshot:
            if not news.events:
                lanes.pop(news.lane_id, None)
                return True
            lanes[news.lane_id] = _LaneView(news.page_size, news.first_number)
        view = lanes.get(news.lane_id)
        if view is None:
            return False
        if not news.is_snapshot:
            if news.first_number != view.next_number:
                del lanes[news.lane_id]
                return False
            view.next_number += len(news.events)
        for kind, hashes in news.events:
            if kind == STORED:
                view.blocks.update(hashes[: max(0, BLOCKS_MAX - len(view.blocks))])
            elif kind == REMOVED:
                view.blocks.difference_update(hashes)
            elif kind == CLEARED:
                view.blocks.clear()
        return True

    def forget(self, scheduler: int) -> None:
        """A scheduler is gone."""
        self._schedulers.pop(scheduler, None)

    def with_most_cached(self, loads: Mapping[int, int], prompt: CachePrompt) -> set[int]:
        """Choose among schedulers with their loads: of those not much busier than the least busy, the ones with most of the prompt.

        All of them when none of those has anything of it.
        """
        most_load = min(loads.values()) + CACHE_LOAD_SLACK
        cached = {one: self.num_cached_tokens(one, prompt) for one, load in loads.items() if load <= most_load}
        most = max(cached.values())
        return {one for one, num_tokens in cached.items() if num_tokens == most} if most else set(loads)

    def num_cached_tokens(self, scheduler: int, prompt: CachePrompt) -> int:
        """Tokens at the start of the prompt that a lane of the scheduler has cached, of the lane that has most."""
        views = self._schedulers.get(scheduler, {}).values()
        found = 0
        for page_size in {view.page_size for view in views if view.blocks}:
            same = [view.blocks for view in views if view.page_size == page_size]
            num_blocks = _num_leading(_hashes(prompt, page_size), same)
            found = max(found, num_blocks * page_size)
        return found


def namespace_hash(namespace: str) -> int:
    """What the first block of a namespace is chained to."""
    return int.from_bytes(blake2b(namespace.encode(), digest_size=_HASH_BYTES).digest(), "big")


def _hashes(prompt: CachePrompt, page_size: int) -> Iterable[int]:
    """Chained hashes of the prompt's full blocks."""
    chained = namespace_hash(prompt.namespace).to_bytes(_HASH_BYTES, "big")
    page_bytes = page_size * _TOKEN_BYTES
    for start in range(0, len(prompt.tokens) - page_bytes + 1, page_bytes):
        chained = blake2b(chained + prompt.tokens[start : start + page_bytes], digest_size=_HASH_BYTES).digest()
        yield int.from_bytes(chained, "big")


def _num_leading(hashes: Iterable[int], lanes: list[set[int]]) -> int:
    """How many hashes, from the first on, the lane that has most of them has."""
    num = 0
    for block in hashes:
        lanes = [blocks for blocks in lanes if block in blocks]
        if not lanes:
            break
        num += 1
    return num
