"""The way from the waiting queue into the lanes.

The next sequence of the queue enters the lane that suits it best among those that can take it and whose pages are expected to last.
Where none can, running sequences of lower classes may have to leave (`policies/priority.py`). A sequence whose beginning is just
being computed for another one waits aside until that is done, and takes it from the cache: the same prefix is not computed twice.
Choices of one request fork from one prefill (`forks.py`). Those behind go on meanwhile.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from services.scheduler.counts import Counts
from services.scheduler.forks import Forks
from services.scheduler.future_need import is_future_sound
from services.scheduler.lane import Lane
from services.scheduler.lanes import Lanes
from services.scheduler.output_lengths import LengthEstimate
from services.scheduler.policies.priority import promoted, victims
from services.scheduler.radix_tree import Match
from services.scheduler.sequence import Sequence, Status
from services.scheduler.waiting_queue import WaitingQueue

SIBLING_TOKENS_MIN: Final = 32
"""Tokens that must be saved before a sequence waits for another's prefill."""


class Entrance:
    """Admits.

    Args:
        lanes: Where to.
        queue: Where from.
        lengths: What outputs are expected to need.
        counts: Where preemptions and waits for siblings are counted.
        preemption_threshold: How far below a waiting sequence's priority a running one must be to make room for it; None for never.
    """

    def __init__(
        self,
        lanes: Lanes,
        queue: WaitingQueue,
        lengths: LengthEstimate,
        counts: Counts,
        *,
        preemption_threshold: int | None = None,
    ) -> None:
        self._lanes = lanes
        self._queue = queue
        self._lengths = lengths
        self._counts = counts
        self._threshold = preemption_threshold
        # When nobody could enter: the queue as it was, whose turn it was (None: no lane had a slot), and the lanes that have
        # changed since. All others still have no room.
        self._stuck: tuple[int, Sequence | None] | None = None
        self._touched: dict[Lane, None] = {}
        # A sequence for which nobody would have to leave, and how the lanes were then.
        self._without_victims: tuple[Sequence, list[tuple[int, int]]] | None = None
        # By lane, the sequence last found to ask too much of its pages, and how the lane was then.
        self._unsound: dict[int, tuple[Sequence, int, int]] = {}
        # Sequences admitted to a lane, by the first page of their tokens; those whose prefill is over are dropped when met.
        self._prefills: dict[tuple[int, str, bytes], list[Sequence]] = {}
        self._num_prefills_max = 64
        self._forks = Forks()

    def next(self) -> Sequence | None:
        """The waiting sequence to decide on; None when none waits or surely none could enter."""
        self._queue.take_up_held()
        if not len(self._queue):
            return None
        if self._stuck is not None and not self._touched and self._stuck[0] == self._queue.num_changes:
            return None
        # Without a free slot nobody can enter, and some policies take long to say who would.
        if self._threshold is None and not self._has_free_slot():
            self._set_stuck(None)
            return None
        return self._queue.peek()

    def touch(self, lane: Lane) -> None:
        """Something about a lane has changed: there may be room."""
        self._touched[lane] = None

    def admit(self, sequence: Sequence, now_ns: int) -> bool:
        """Bring the next sequence into a lane, or aside. False when it has to wait where it is."""
        sources = self._forks.sources(sequence)
        sound = [source for source in sources if source.is_sound]
        if sources and not sound:
            return self._hold(sequence, sources[0])
        among = self._touched if self._stuck is not None and self._stuck[1] is sequence else None
        choice = self._beside(sound, sequence) or self._lanes.choose(sequence, self._can_enter, among) or self._make_room(sequence)
        if choice is None:
            self._set_stuck(sequence)
            return False
        self._stuck = None
        lane, match = choice
        source = next((source for source in sound if source.lane is lane), None)
        if source is None and (sibling := self._sibling(lane, sequence, match)) is not None:
            return self._hold(sequence, sibling)
        self._enter(lane, sequence, match, source=source, now_ns=now_ns)
        return True

    def _enter(self, lane: Lane, sequence: Sequence, match: Match, *, source: Sequence | None, now_ns: int) -> None:
        self._queue.remove(sequence, now_ns)
        if self._threshold is not None:
            sequence.promoted_priority = promoted(sequence, now_ns)
        self._counts.num_forked += source is not None
        lane.admit(sequence, match, source if lane.capacity.copies_pages else None)
        self._forks.entered(sequence)
        self._lanes.took(lane, sequence)
        # Prompts whose logprobs are wanted are computed whole and slowly: they wait for nobody, and nobody for them.
        if lane.kv.keeps_prefixes and not sequence.wants_prompt_logprobs:
            self._prefills.setdefault(_first_page(lane, sequence), []).append(sequence)
            self._drop_finished_prefills()

    def _hold(self, sequence: Sequence, sibling: Sequence) -> bool:
        self._counts.num_held += 1
        self._queue.hold(sequence, sibling)
        return True

    def _beside(self, sources: list[Sequence], sequence: Sequence) -> tuple[Lane, Match] | None:
        """The lane of a source, where the sequence finds its whole prompt, if it can enter there."""
        for source in sources:
            assert source.lane is not None
            match = source.lane.kv.match(sequence)
            if self._can_enter(source.lane, sequence, match):
                return source.lane, match
        return None

    def take_back(self, preempted: list[Sequence]) -> None:
        """Sequences that ran have lost their place and wait again, the last of them first."""
        for sequence in preempted:
            self._queue.take_back(sequence)
        self._counts.num_preemptions += len(preempted)

    def forget(self, lane: Lane) -> None:
        """A lane is gone."""
        self._unsound.pop(lane.lane_id, None)
        self._touched.pop(lane, None)
        self._stuck = None
        for key in [key for key in self._prefills if key[0] == lane.lane_id]:
            del self._prefills[key]

    def _has_free_slot(self) -> bool:
        if self._stuck is not None and self._stuck[1] is None:
            return any(lane.slots.num_free for lane in self._touched)
        return self._lanes.has_free_slot()

    def _set_stuck(self, sequence: Sequence | None) -> None:
        self._stuck = (self._queue.num_changes, sequence)
        self._touched.clear()

    def _can_enter(self, lane: Lane, sequence: Sequence, match: Match) -> bool:
        if not lane.can_admit(sequence, match):
            return False
        # Until somebody leaves, what was too much stays so.
        state = (sequence, lane.version, lane.num_running)
        if self._unsound.get(lane.lane_id) == state:
            return False
        if is_future_sound(lane, sequence, match, self._lengths):
            return True
        self._unsound[lane.lane_id] = state
        return False

    def _make_room(self, sequence: Sequence) -> tuple[Lane, Match] | None:
        """Preempt running sequences of lower classes, as few as can be, until this one can enter."""
        if self._threshold is None:
            return None
        state = [(lane.version, lane.num_running) for lane in self._lanes]
        if self._without_victims == (sequence, state):
            return None
        found = [
            (lane, weaker)
            for lane in self._lanes
            if (weaker := victims(lane, sequence, lane.kv.match(sequence), threshold=self._threshold))
        ]
        if not found:
            self._without_victims = (sequence, state)
            return None
        lane, weaker = min(found, key=lambda one: len(one[1]))
        for victim in weaker:
            lane.release(victim)
            victim.status = Status.WAITING
            victim.num_preemptions += 1
            self.take_back([victim])
            match = lane.kv.match(sequence)
            if lane.can_admit(sequence, match):
                return lane, match
        return None

    def _drop_finished_prefills(self) -> None:
        """Once they may be the greater part."""
        if len(self._prefills) > self._num_prefills_max:
            for key, prefills in list(self._prefills.items()):
                if not any(_is_under_way(other, key[0]) for other in prefills):
                    del self._prefills[key]
            self._num_prefills_max = 64 + 2 * len(self._prefills)

    def _sibling(self, lane: Lane, sequence: Sequence, match: Match) -> Sequence | None:
        """Whose prefill, under way on the lane, computes the most of what this one would have to; None when that is too little."""
        key = _first_page(lane, sequence)
        prefills = self._prefills.get(key)
        if prefills is None or sequence.wants_prompt_logprobs:
            return None
        prefills[:] = [other for other in prefills if _is_under_way(other, lane.lane_id)]
        if not prefills:
            del self._prefills[key]
            return None
        page_size = lane.kv.pool.page_size
        best = max(prefills, key=lambda other: _num_common(other, sequence))
        num_usable = min(_num_common(best, sequence), sequence.num_tokens - 1) // page_size * page_size
        return best if num_usable - match.num_pages * page_size >= max(page_size, SIBLING_TOKENS_MIN) else None


def _is_under_way(sequence: Sequence, lane_id: int) -> bool:
    """Whether its prompt is being computed on that lane."""
    return sequence.lane is not None and sequence.lane.lane_id == lane_id and not sequence.is_sound


def _first_page(lane: Lane, sequence: Sequence) -> tuple[int, str, bytes]:
    return lane.lane_id, sequence.namespace, sequence.tokens[: lane.kv.pool.page_size].tobytes()


def _num_common(a: Sequence, b: Sequence) -> int:
    """Tokens at the start in which two sequences agree."""
    num_tokens = min(a.num_tokens, b.num_tokens)
    differs = np.frombuffer(a.tokens, dtype=np.int32, count=num_tokens) != np.frombuffer(b.tokens, dtype=np.int32, count=num_tokens)
    return int(differs.argmax()) if differs.any() else num_tokens
