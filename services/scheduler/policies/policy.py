"""What a waiting policy is: an order over the sequences that wait.

One file a policy beside this one. A policy holds the sequences in whatever structure its order needs and says which is next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from services.scheduler.sequence import Sequence


class Policy(Protocol):
    """An order over waiting sequences.

    Attributes:
        takes_back: Sequences that have run before come back into the order; else they stand in front of it.
    """

    takes_back: bool

    def __len__(self) -> int:
        """Sequences held."""
        ...

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in any order."""
        ...

    def add(self, sequence: Sequence) -> None:
        """Take a sequence that has begun to wait."""
        ...

    def peek(self) -> Sequence | None:
        """The sequence to admit next, or None when none waits."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is held."""
        ...
