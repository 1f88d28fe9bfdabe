"""Lanes that step together: they are planned in passes, and no lane is ahead of another by more than it is of its own results.

A pass makes a plan for every lane of the group that has something to compute. It is made when all lanes may have another plan, with
one decision about new prefills for all (`prefill_delayer.py`). A lane's plan waits here until it is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from services.scheduler.lane import Lane
from services.scheduler.planner import can_plan, plan_step
from services.scheduler.prefill_delayer import DelayerLimits, LanePass, PassOutcome, PrefillDelayer
from services.scheduler.sequence import Sequence
from services.scheduler.step_plan import StepPlan


class LaneGroup:
    """The lanes of one group.

    Args:
        limits: Of the delayer.
        take_back: Told of sequences that a pass has preempted.
    """

    def __init__(self, limits: DelayerLimits, take_back: Callable[[list[Sequence]], None]) -> None:
        self._delayer = PrefillDelayer(limits)
        self._take_back = take_back
        self._lanes: dict[Lane, deque[StepPlan]] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def add(self, lane: Lane) -> None:
        """A lane joins."""
        self._lanes[lane] = deque()

    def remove(self, lane: Lane) -> None:
        """A lane is lost."""
        del self._lanes[lane]

    def plan(self, lane: Lane, now_ns: int) -> StepPlan | None:
        """The lane's next plan, out of a new pass where it is time for one; None when there is none for it."""
        plans = self._lanes[lane]
        if not self.has_plans:
            self._make_pass(now_ns)
        return plans.popleft() if plans else None

    @property
    def has_plans(self) -> bool:
        """Whether plans have been made that wait to be asked for."""
        return any(self._lanes.values())

    def take_outcomes(self) -> list[PassOutcome]:
        """Passes since the last call, for the metrics."""
        return self._delayer.take_outcomes()

    def _make_pass(self, now_ns: int) -> None:
        lanes = list(self._lanes)
        # One that is still at its last two steps holds up all: that is what stepping together means.
        if any(lane.in_flight and not can_plan(lane) and lane.has_work for lane in lanes) or not any(map(can_plan, lanes)):
            return
        states = [LanePass(lane.has_new_prompt, lane.kv.usage) for lane in lanes]
        with self._delayer.one_pass(states, now_ns, is_idle=all(map(_is_idle, lanes))) as under_way:
            for lane in lanes:
                plan = plan_step(lane, may_begin=under_way.decision.allow)
                if plan is not None:
                    under_way.was_executed |= bool(plan.new_sequences)
                    self._take_back(plan.preempted)
                    self._lanes[lane].append(plan)


def _is_idle(lane: Lane) -> bool:
    """Whether a lane has nothing to compute but prompts that could begin."""
    return not lane.in_flight and not lane.decoding and all(sequence.is_new_prompt for sequence in lane.prefilling)


class LaneGroups:
    """All groups, and the lanes that step alone.

    Args:
        limits: Of each group's delayer.
        take_back: Told of sequences that a plan has preempted.
    """

    def __init__(self, limits: DelayerLimits, take_back: Callable[[list[Sequence]], None]) -> None:
        self._limits = limits
        self._take_back = take_back
        self._groups: dict[str, LaneGroup] = {}

    def add(self, lane: Lane) -> None:
        """A lane joins."""
        name = lane.capacity.group
        if name:
            self._groups.setdefault(name, LaneGroup(self._limits, self._take_back)).add(lane)

    def remove(self, lane: Lane) -> None:
        """A lane is lost."""
        name = lane.capacity.group
        if name:
            self._groups[name].remove(lane)

    def plan(self, lane: Lane, now_ns: int) -> StepPlan | None:
        """The lane's next plan, or None when there is none now."""
        if lane.capacity.group:
            return self._groups[lane.capacity.group].plan(lane, now_ns)
        plan = plan_step(lane)
        if plan is not None:
            self._take_back(plan.preempted)
        return plan

    def has_plans(self, name: str) -> bool:
        """Whether a group's lanes have plans that wait to be asked for: a pass may give some to others than the lane that asked."""
        return self._groups[name].has_plans

    def take_outcomes(self) -> list[PassOutcome]:
        """Passes of all groups since the last call, for the metrics."""
        return [outcome for group in self._groups.values() for outcome in group.take_outcomes()]
