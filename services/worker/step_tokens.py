"""What a step gave: the tokens of each row, and the rows that failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tokens by row; lists in parallel, in the plan's order.

    Attributes:
        slots: Slots of the rows that gave tokens.
        token_ids: The tokens, flat.
        counts: How many each gave; empty for one each.
        num_drafts: Drafts verified in each; empty where no row carried any.
        failed_slots: Slots of the rows whose logits were not finite.
    """

    slots: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)
    failed_slots: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """Slots with their tokens."""
        start = 0
        for slot, count in zip(self.slots, self.counts or repeat(1), strict=False):
            yield slot, self.token_ids[start : start + count]
            start += count
