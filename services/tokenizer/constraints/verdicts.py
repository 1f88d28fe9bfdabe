"""What became of constraints, so that one that is sent again is not compiled again. Bounded by bytes; the oldest go first. Pure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

from headrace.errors import InvalidRequestError

Verdict = str | InvalidRequestError
"""The grammar for workers, or what is wrong with the constraint."""

_ENTRY_BYTES: Final = 512


class Verdicts:
    """The cache.

    Args:
        max_bytes: Of all verdicts together, about.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held, about."""
        return self._num_bytes

    def find(self, kind: int, source: str, param: str, block: object = None) -> Verdict | None:
        """The verdict on a constraint behind a block of reasoning, or none; None where there is no verdict any more."""
        key = _key(kind, source, param, block)
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
        return self._verdicts.get(key)

    def keep(self, kind: int, source: str, param: str, verdict: Verdict, block: object = None) -> None:
        """Keep a verdict, unless it alone is too large."""
        key, size = _key(kind, source, param, block), _size(verdict)
        if key in self._verdicts or size > self._max_bytes:
            return
        self._verdicts[key] = verdict
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            _, oldest = self._verdicts.popitem(last=False)
            self._num_bytes -= _size(oldest)


def _key(kind: int, source: str, param: str, block: object) -> bytes:
    return hashlib.sha256(f"{kind}\0{block!r}\0{param}\0{source}".encode()).digest()


def _size(verdict: Verdict) -> int:
    # A string with one character beyond Latin-1 takes up to four bytes for each.
    return _ENTRY_BYTES + 4 * len(verdict if isinstance(verdict, str) else verdict.message)
