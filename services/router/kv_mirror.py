"""What all lanes together have cached, block by block with tokens, told on to gateways as changes.

A gateway sees this system as one engine, however many lanes there are: a block is stored when the first lane
has it and removed when the last one gives it up. Who reads gets everything there is first, and changes from then on; who reads too
slowly is made to begin anew. What is known comes from `CacheEvents` with tokens, so it may be a little old.

Prefixes of namespaces (salts, tenants kept apart) are left out: a gateway looks prompts up by their tokens alone, and would send
others there for nothing.

Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from services.router.prefix_directory import CLEARED, REMOVED, STORED, LaneNews, namespace_hash

PENDING_MAX: Final = 4096
"""Changes kept for a reader; one that falls further behind begins anew."""

BATCH_MAX: Final = 256
"""Most changes given at a time."""


_START: Final = namespace_hash("")


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A block that some lane has now.

    Attributes:
        block: Its chained hash.
        before: That of the block before it; None of the first.
        tokens: Its own, int32, little-endian.
    """

    block: int
    before: int | None
    tokens: bytes


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """A block that no lane has any more."""

    block: int


@dataclass(frozen=True, slots=True)
class AllCleared:
    """Everything said before is void."""


Change = BlockStored | BlockRemoved | AllCleared


@dataclass(slots=True)
class _Block:
    before: int
    tokens: bytes
    num_lanes: int = 0


class KvReader:
    """One gateway's place in the changes; `wake` is called when there are some."""

    def __init__(self, mirror: KvMirror, wake: Callable[[], object]) -> None:
        self._mirror = mirror
        self._wake = wake
        self._pending: deque[Change] = deque(mirror.snapshot())

    def push(self, change: Change) -> None:
        """A change has happened."""
        self._pending.append(change)
        if len(self._pending) > PENDING_MAX + self._mirror.num_blocks:
            self._pending = deque((AllCleared(), *self._mirror.snapshot()))
        self._wake()

    def take(self) -> list[Change]:
        """The next changes, oldest first; empty when there are none."""
        return [self._pending.popleft() for _ in range(min(BATCH_MAX, len(self._pending)))]


class KvMirror:
    """Blocks by lane, and their readers."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._lanes: dict[tuple[int, int], set[int]] = {}
        self._readers: list[KvReader] = []

    @property
    def num_blocks(self) -> int:
        """Different blocks that some lane has."""
        return len(self._blocks)

    @property
    def has_readers(self) -> bool:
        """Whether anybody wants to know."""
        return bool(self._readers)

    def open(self, wake: Callable[[], object]) -> KvReader:
        """Read from now on, beginning with all that is cached."""
        reader = KvReader(self, wake)
        self._readers.append(reader)
        return reader

    def close(self, reader: KvReader) -> None:
        """A reader leaves. With the last one everything is forgotten."""
        self._readers.remove(reader)
        if not self._readers:
            self._blocks.clear()
            self._lanes.clear()

    def snapshot(self) -> Iterator[BlockStored]:
        """All blocks as if they were stored now, those before others first: dictionaries keep the order in which blocks came."""
        for block, held in self._blocks.items():
            yield self._stored(block, held)

    def update(self, scheduler: int, news: LaneNews) -> None:
        """Take a scheduler's news in; news without tokens are of no use here and say nothing."""
        if not self._readers or not news.has_tokens:
            return
        lane = (scheduler, news.lane_id)
        if news.is_snapshot:
            # What comes again at once is not removed first.
            gone = self._lanes.pop(lane, set())
            self._lanes[lane] = set()
            self._store_all(lane, news)
            for block in gone:
                self._give_up(block)
            if not news.events:
                del self._lanes[lane]
            return
        self._store_all(lane, news)

    def forget(self, scheduler: int) -> None:
        """A scheduler is gone, and its caches with it."""
        for lane in [one for one in self._lanes if one[0] == scheduler]:
            for block in self._lanes.pop(lane):
                self._give_up(block)

    def _store_all(self, lane: tuple[int, int], news: LaneNews) -> None:
        held = self._lanes.setdefault(lane, set())
        page_bytes = 4 * news.page_size
        at = 0
        for (kind, hashes), before in zip(news.events, news.parents, strict=True):
            if kind == STORED:
                for above, block in pairwise((before, *hashes)):
                    self._store(held, block, above, news.tokens[at : at + page_bytes])
                    at += page_bytes
            elif kind in {REMOVED, CLEARED}:
                for block in hashes if kind == REMOVED else tuple(held):
                    if block in held:
                        held.discard(block)
                        self._give_up(block)

    def _store(self, held: set[int], block: int, before: int, tokens: bytes) -> None:
        if block in held:
            return
        known = self._blocks.get(block)
        if known is None:
            if before != _START and before not in self._blocks:
                return
            known = self._blocks[block] = _Block(before, tokens)
            self._tell(self._stored(block, known))
        known.num_lanes += 1
        held.add(block)

    def _give_up(self, block: int) -> None:
        known = self._blocks[block]
        known.num_lanes -= 1
        if not known.num_lanes:
            del self._blocks[block]
            self._tell(BlockRemoved(block))

    def _stored(self, block: int, held: _Block) -> BlockStored:
        return BlockStored(block, None if held.before == _START else held.before, held.tokens)

    def _tell(self, change: Change) -> None:
        for reader in self._readers:
            reader.push(change)
