"""The slots of one lane: the small numbers by which scheduler and worker name a sequence between them.

A slot is freed in two moves: at once here, and at the worker with the next plan, which frees before it enters anything new. So a
slot may be given out again in the very plan that frees it.
"""

from __future__ import annotations


class SlotTable:
    """Owner of the slots 0 .. num_slots - 1.

    Attributes:
        num_slots: How many there are.
        num_allocations: How often one was taken.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_allocations = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        """Slots nobody holds."""
        return len(self._free)

    @property
    def has_freed(self) -> bool:
        """Whether the worker still has to be told of a freed slot."""
        return bool(self._freed)

    def allocate(self) -> int:
        """Take a slot; there must be a free one."""
        self.num_allocations += 1
        return self._free.pop()

    def free(self, slot: int, *, is_announced: bool) -> None:
        """Give a slot back; `is_announced` when the worker knows it and has to be told."""
        self._free.append(slot)
        if is_announced:
            self._freed.append(slot)

    def take_freed(self) -> list[int]:
        """Slots to name as freed in the plan being made."""
        freed, self._freed = self._freed, []
        return freed
