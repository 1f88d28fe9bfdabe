"""Longest prefix match: who has most of its prompt cached goes first, while it is still there.

Source: RadixAttention, SGLang (NeurIPS 2024).
"""

from __future__ import annotations

from services.scheduler.policies.by_prefix import ByPrefix
from services.scheduler.sequence import Sequence


class LongestPrefixMatch(ByPrefix):
    """By cached tokens, falling; among equals the order of arrival."""

    def rank(self, window: list[Sequence]) -> list[Sequence]:
        """Sort; Python's sort keeps equals in their order."""
        return sorted(window, key=lambda sequence: -self._lanes.longest_prefix(sequence)[1])
