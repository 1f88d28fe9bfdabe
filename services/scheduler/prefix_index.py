"""Where a lane looks for KV it has already: the seam of the prefix cache.

A lane asks its index when it admits a sequence. `NoPrefixes`, the only one so far, never finds anything, so all pages are either
free or held by running sequences.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple, Protocol


class PrefixMatch(NamedTuple):
    """KV found for the start of a sequence.

    Attributes:
        pages: Full pages, in order, which the sequence may use.
        num_cached_tokens: Tokens they hold; less than the sequence's tokens, for its last token must be computed.
    """

    pages: list[int]
    num_cached_tokens: int


class PrefixIndex(Protocol):
    """Finds pages whose KV begins a sequence."""

    def match(self, tokens: array[int]) -> PrefixMatch:
        """Longest known prefix of `tokens`."""
        ...


class NoPrefixes:
    """An index that remembers nothing."""

    def match(self, tokens: array[int]) -> PrefixMatch:
        """Nothing, whatever is asked."""
        return PrefixMatch([], 0)
