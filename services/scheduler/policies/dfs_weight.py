"""Depth first by weight: walks the radix tree, the branch for which most sequences wait first, so that a branch is served whole.

Source: SGLang's `dfs-weight`.
"""

from __future__ import annotations

from collections import Counter

from services.scheduler.policies.by_prefix import ByPrefix
from services.scheduler.radix_tree import Node
from services.scheduler.sequence import Sequence


class DepthFirstByWeight(ByPrefix):
    """A node's children, the heaviest first, then its own sequences; last of all those with nothing cached."""

    def rank(self, window: list[Sequence]) -> list[Sequence]:
        """Hang each sequence to the node its prefix ends in, weigh the nodes, and walk."""
        ends: dict[Node | None, list[Sequence]] = {}
        for sequence in window:
            ends.setdefault(self._lanes.longest_prefix(sequence)[0], []).append(sequence)
        weights: Counter[Node] = Counter()
        # Dictionaries as ordered sets: among equals the order of arrival decides.
        children: dict[Node | None, dict[Node, None]] = {}
        for end, sequences in ends.items():
            node = end
            while node is not None:
                weights[node] += len(sequences)
                children.setdefault(node.parent, {})[node] = None
                node = node.parent
        order: list[Sequence] = []
        # Without recursion: a tree may be deep. A node is pushed twice, the second time for its own sequences.
        stack: list[tuple[Node | None, bool]] = [(None, False)]
        while stack:
            above, is_walked = stack.pop()
            if is_walked:
                order += ends.get(above, [])
                continue
            stack.append((above, True))
            heaviest_first = sorted(children.get(above, {}), key=lambda node: -weights[node])
            stack += [(node, False) for node in reversed(heaviest_first)]
        return order
