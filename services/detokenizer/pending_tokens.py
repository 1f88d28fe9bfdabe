"""Tokens that came before their stream was opened.

Router and scheduler are different senders, so a fast scheduler's first tokens can overtake the router's OpenStream. They wait
here, within bounds of age and number. What is thrown out is not lost for good: when its stream is opened, the gap shows and the
tokens are sent again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from headrace.v1.common_pb2 import FinishReason
from services.detokenizer.logprobs import Told


@dataclass(slots=True)
class TokenEntry:
    """One stream's part of a token batch. Not frozen: one is made for every stream of every batch, and freezing is slow."""

    position: int
    token_ids: list[int]
    finish_reason: FinishReason
    num_stop_tokens: int
    num_cached_tokens: int
    source: int
    """Process life of the scheduler that sent it."""
    told: Told | None = None


@dataclass(slots=True)
class _Waiting:
    since_ns: int
    entries: list[TokenEntry] = field(default_factory=list)
    num_tokens: int = 0


class PendingTokens:
    """Bounded by tokens in all and by age; the oldest stream goes first."""

    def __init__(self, *, tokens_max: int, age_max_ns: int) -> None:
        self._tokens_max = tokens_max
        self._age_max_ns = age_max_ns
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()
        self._num_tokens = 0

    def __len__(self) -> int:
        """Streams that wait."""
        return len(self._waiting)

    def add(self, stream_id: int, entry: TokenEntry, *, now_ns: int) -> int:
        """Keep an entry; give how many streams were thrown out for it."""
        waiting = self._waiting.setdefault(stream_id, _Waiting(now_ns))
        waiting.entries.append(entry)
        # An entry without tokens still takes a place.
        size = len(entry.token_ids) + 1 + (entry.told.num_numbers if entry.told is not None else 0)
        waiting.num_tokens += size
        self._num_tokens += size
        num_evicted = 0
        while self._num_tokens > self._tokens_max:
            self._evict_oldest()
            num_evicted += 1
        return num_evicted

    def pop(self, stream_id: int) -> list[TokenEntry]:
        """Give and forget what waits for a stream, in the order it came."""
        waiting = self._waiting.pop(stream_id, None)
        if waiting is None:
            return []
        self._num_tokens -= waiting.num_tokens
        return waiting.entries

    def expire(self, *, now_ns: int) -> int:
        """Throw out streams that have waited too long; give how many."""
        num_expired = 0
        while self._waiting and now_ns - next(iter(self._waiting.values())).since_ns > self._age_max_ns:
            self._evict_oldest()
            num_expired += 1
        return num_expired

    def _evict_oldest(self) -> None:
        _, waiting = self._waiting.popitem(last=False)
        self._num_tokens -= waiting.num_tokens
