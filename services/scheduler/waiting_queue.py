"""The waiting queue: sequences that no lane has admitted, bounded by requests and by tokens.

New sequences are ordered by a policy. Sequences that have run before (preempted, or of a lane that was lost) stand in front of all
others, or where the policy puts them, and are exempt from the bounds: they were accepted once. A sequence can be held aside while
the same prefix is computed for another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from headrace.errors import OverloadedError
from services.scheduler.drain_rate import DrainRate
from services.scheduler.policies.policy import Policy
from services.scheduler.sequence import Sequence

if TYPE_CHECKING:
    from services.scheduler.lane import Lane


class WaitingQueue:
    """Where sequences wait.

    Attributes:
        max_requests: Most sequences that may wait before a new one is refused.
        max_tokens: Most tokens of waiting sequences together; a sequence that would wait alone is always taken.
        num_tokens: Tokens of the sequences that wait.
        num_changes: Sequences that came, left, or found another place; counted from the start.
    """

    def __init__(self, policy: Policy, *, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.num_changes = 0
        self._policy = policy
        self._front: OrderedDict[Sequence, None] = OrderedDict()
        # Each with the sequence whose prefill it waits for, and the lane of that.
        self._held: dict[Sequence, tuple[Sequence, Lane | None]] = {}
        self._requests_left = DrainRate()
        self._tokens_left = DrainRate()

    def __len__(self) -> int:
        return len(self._held) + len(self._front) + len(self._policy)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._held
        yield from self._front
        yield from self._policy

    def check_room(self, num_tokens: int, now_ns: int) -> None:
        """Refuse a new sequence of `num_tokens` tokens that would pass a bound.

        Raises:
            OverloadedError: Names the bound, and says when the measured drain rate will have made room.
        """
        num_waiting = len(self)
        if num_waiting >= self.max_requests:
            raise OverloadedError(
                f"scheduler: {num_waiting} requests wait and max_waiting_requests is {self.max_requests}; retry later",
                retry_after_s=self._requests_left.seconds_for(num_waiting - self.max_requests + 1, now_ns),
            )
        if num_waiting and self.num_tokens + num_tokens > self.max_tokens:
            raise OverloadedError(
                f"scheduler: {self.num_tokens} tokens wait, this request has {num_tokens} and max_waiting_tokens is "
                f"{self.max_tokens}; retry later",
                retry_after_s=self._tokens_left.seconds_for(self.num_tokens + num_tokens - self.max_tokens, now_ns),
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.num_changes += 1
        self._policy.add(sequence)
        self.num_tokens += sequence.num_tokens

    def take_back(self, sequence: Sequence) -> None:
        """Queue a sequence that has run before, in front of all others unless the policy has a place for it."""
        self._put_back(sequence)
        self.num_tokens += sequence.num_tokens

    def hold(self, sequence: Sequence, sibling: Sequence) -> None:
        """Set a waiting sequence aside until the prefill of a running one is over."""
        self.num_changes += 1
        if sequence in self._front:
            del self._front[sequence]
        else:
            self._policy.remove(sequence)
        self._held[sequence] = (sibling, sibling.lane)

    def take_up_held(self) -> None:
        """Put those back, in front, whose sibling's prefill is over, one way or another."""
        if not self._held:
            return
        done = [one for one, (sibling, lane) in self._held.items() if sibling.is_sound or sibling.lane is not lane]
        for sequence in reversed(done):
            del self._held[sequence]
            self._put_back(sequence)

    def peek(self) -> Sequence | None:
        """The sequence to admit next, or None."""
        if self._front:
            return next(iter(self._front))
        return self._policy.peek()

    def remove(self, sequence: Sequence, now_ns: int) -> None:
        """Take a sequence out: it was admitted, or it ended."""
        self.num_changes += 1
        if sequence in self._held:
            del self._held[sequence]
        elif sequence in self._front:
            del self._front[sequence]
        else:
            self._policy.remove(sequence)
        if not sequence.num_admissions:
            # One that was here before has only given back the room that it took again.
            self._requests_left.record(1, now_ns)
            self._tokens_left.record(sequence.num_tokens, now_ns)
        self.num_tokens -= sequence.num_tokens

    def _put_back(self, sequence: Sequence) -> None:
        self.num_changes += 1
        if self._policy.takes_back:
            self._policy.add(sequence)
        else:
            self._front[sequence] = None
            self._front.move_to_end(sequence, last=False)
