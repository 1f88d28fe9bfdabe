"""First come, first served."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from services.scheduler.sequence import Sequence


class FirstComeFirstServed:
    """The order of arrival."""

    takes_back = False

    def __init__(self) -> None:
        # An OrderedDict takes from the front and from the middle in constant time; a dict's front gets slower with every removal.
        self._sequences: OrderedDict[Sequence, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence behind all others."""
        self._sequences[sequence] = None

    def peek(self) -> Sequence | None:
        """The one that has waited longest."""
        return next(iter(self._sequences), None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is held."""
        del self._sequences[sequence]
