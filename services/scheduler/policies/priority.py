"""Priority classes: the more important first, and nobody starves.

A request's priority is a number (`headrace/priorities.py`), larger for more important. Waiting raises it by one every
`PROMOTE_AFTER_S`, so what waits is overtaken only by what came soon after it, however much of higher classes keeps coming. Among
equals the order is that of arrival. What was preempted comes back at its old place in the order.

Where a request finds no room, running ones of a lower class make it (`victims`): those that are at least `threshold` below it,
counted with the promotion they had when they were admitted, so that who has waited long enough is not preempted again and again.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Final

from services.scheduler.lane import Lane
from services.scheduler.policies.by_key import ByKey
from services.scheduler.radix_tree import Match
from services.scheduler.sequence import Sequence

PROMOTE_AFTER_S: Final = 10.0

_PROMOTE_AFTER_NS: Final = PROMOTE_AFTER_S * 1e9


class PriorityClasses(ByKey):
    """By priority and time waited together. Both grow at the same rate for all that wait, so the order never changes."""

    takes_back = True

    def __init__(self) -> None:
        super().__init__(lambda sequence: sequence.queued_ns / _PROMOTE_AFTER_NS - sequence.priority)


def promoted(sequence: Sequence, now_ns: int) -> float:
    """A waiting sequence's priority with what waiting has added."""
    return sequence.priority + max(0, now_ns - sequence.queued_ns) / _PROMOTE_AFTER_NS


def victims(lane: Lane, sequence: Sequence, match: Match, *, threshold: int) -> Items[Sequence]:
    """Who would have to leave a lane so that a sequence can enter, in that order; empty when that would not help.

    Those of the lowest class go first, among equals the latest admitted. Pages that others share may not come free, so the number
    may turn out too small.
    """
    if lane.is_draining or not lane.fits(sequence.num_tokens) or not lane.has_prompt_budget:
        return ()
    weaker = [
        other
        for other in lane.running()
        if sequence.priority - other.promoted_priority >= threshold and other not in lane.last_rows
    ]
    weaker.sort(key=lambda other: (other.promoted_priority, -other.admission))
    num_left = lane.kv.num_left(sequence, match)
    for index, other in enumerate(weaker):
        num_left += len(other.pages)
        if num_left >= lane.num_running - index - 1:
            return weaker[: index + 1]
    return ()
