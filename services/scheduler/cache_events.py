"""What a lane's prefix cache holds, told to others: events with numbers that have no gap, and a snapshot to begin from.

A block is one page of tokens in its place behind all pages before it. Its hash is chained: the first 8 bytes, big-endian, of
blake2b(digest_size=8) over the 8 bytes of the hash before it and the page's tokens as little-endian int32. The hash before the
first page is that of the namespace: blake2b(digest_size=8) over its UTF-8. Whoever knows a prompt and the page size can compute its
blocks' hashes (`block_hashes`) and look up how much of it a lane has.

An event is `Stored` or `Removed`, with the hashes of blocks that follow one another, or `Cleared`, of everything. None is recorded
until somebody asks (`RadixTree.log`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import Final

HASH_BYTES: Final = 8
EVENTS_MAX: Final = 10_000
"""Events kept for the next `take`; with more than that the log begins anew with a snapshot."""


class EventKind(IntEnum):
    """The numbers are those of `headrace.v1.CacheEventKind`."""

    STORED = 1
    REMOVED = 2
    CLEARED = 3


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One change.

    Attributes:
        kind: What happened.
        hashes: Of the blocks, in order.
        before: What the first of the stored blocks is chained to.
        tokens: Those of the stored blocks, int32, little-endian.
    """

    kind: EventKind
    hashes: tuple[int, ...] = ()
    before: int = 0
    tokens: bytes = b""


def namespace_hash(namespace: str) -> int:
    """What the first block of a namespace is chained to."""
    return int.from_bytes(blake2b(namespace.encode(), digest_size=HASH_BYTES).digest(), "big")


def block_hashes(before: int, tokens: bytes, page_bytes: int) -> list[int]:
    """Hashes of the full pages of `tokens` (int32, little-endian), chained to `before`."""
    found = []
    chained = before.to_bytes(HASH_BYTES, "big")
    for start in range(0, len(tokens) - page_bytes + 1, page_bytes):
        chained = blake2b(chained + tokens[start : start + page_bytes], digest_size=HASH_BYTES).digest()
        found.append(int.from_bytes(chained, "big"))
    return found


class CacheLog:
    """The events of one lane.

    Attributes:
        next_number: Number of the next event; events count from 0.
    """

    def __init__(self) -> None:
        self.next_number = 0
        self._events: list[CacheEvent] = []
        self._has_overflown = False

    def stored(self, event: CacheEvent) -> None:
        """Blocks were added."""
        self._add(event)

    def removed(self, hashes: Iterable[int]) -> None:
        """Blocks were given up."""
        self._add(CacheEvent(EventKind.REMOVED, tuple(hashes)))

    def cleared(self) -> None:
        """All blocks were given up."""
        self._add(CacheEvent(EventKind.CLEARED))

    def take(self) -> tuple[int, list[CacheEvent]] | None:
        """Events since the last call with the number of the first; None when there were too many to keep: take a snapshot then."""
        events, self._events = self._events, []
        if self._has_overflown:
            self._has_overflown = False
            return None
        return self.next_number - len(events), events

    def _add(self, event: CacheEvent) -> None:
        self.next_number += 1
        if len(self._events) >= EVENTS_MAX:
            self._events.clear()
            self._has_overflown = True
        if not self._has_overflown:
            self._events.append(event)
