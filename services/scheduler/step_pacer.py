"""When the plan after the one at the worker shall leave: early enough that the worker never waits, late enough for newcomers.

A request that arrives while a step runs can still enter the next one as long as that has not been planned. So the plan leaves when
the step at the worker is expected to take only `LEAD_SHARE` of its time more. A guess that is too low costs a newcomer that share
of a step at most; one that is too high costs the worker a wait, as if there were no running ahead.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

LEAD_SHARE: Final = 0.25
"""Share of a step, at its end, in which the next plan has left."""
LEAD_MIN_NS: Final = 5_000_000
"""Never less than this: on a busy machine a process may have to wait so long for a core."""
_WEIGHT: Final = 0.3
"""Of the latest step in the averages."""
_GROWTH_MAX: Final = 2.0
"""A pause of the machine counts as no more than a step of twice the usual length."""


@dataclass(frozen=True, slots=True)
class _Step:
    planned_ns: int
    num_extra_tokens: int


class StepPacer:
    """Follows one lane's steps at its worker and learns their times. Times are of a monotonic clock, in nanoseconds."""

    def __init__(self) -> None:
        self._decode_ns = 0.0
        self._token_ns = 0.0
        # Steps whose results are not back; the worker has been at the oldest since about `_begun_ns`.
        self._steps: deque[_Step] = deque()
        self._begun_ns = 0

    @property
    def num_under_way(self) -> int:
        """Steps whose results are not back."""
        return len(self._steps)

    def on_plan(self, num_extra_tokens: int, now_ns: int) -> None:
        """A plan goes to the worker.

        Args:
            num_extra_tokens: Tokens it computes beyond one a row: those of prompts.
            now_ns: Time.
        """
        if not self._steps:
            self._begun_ns = now_ns
        self._steps.append(_Step(now_ns, num_extra_tokens))

    def on_result(self, duration_ns: int, now_ns: int) -> int:
        """The oldest step's result came. Gives the time from its plan to now.

        Args:
            duration_ns: Its time at the worker; zero or less where that is not known.
            now_ns: Time.
        """
        step = self._steps.popleft()
        self._begun_ns = now_ns
        if duration_ns > 0:
            self._learn(step.num_extra_tokens, duration_ns)
        return now_ns - step.planned_ns

    def next_plan_in_ns(self, now_ns: int) -> int:
        """How long from now the next plan shall leave; zero or less for at once."""
        if not self._steps:
            return 0
        expected_ns = self._decode_ns + self._token_ns * self._steps[0].num_extra_tokens
        return self._begun_ns + int(expected_ns - max(LEAD_MIN_NS, LEAD_SHARE * expected_ns)) - now_ns

    def _learn(self, num_extra_tokens: int, duration_ns: int) -> None:
        if num_extra_tokens:
            self._token_ns = _average(self._token_ns, max(0.0, duration_ns - self._decode_ns) / num_extra_tokens)
        else:
            self._decode_ns = _average(self._decode_ns, duration_ns)


def _average(average: float, value: float) -> float:
    if not average:
        return value
    return average + _WEIGHT * (min(value, _GROWTH_MAX * average) - average)
