"""When the plan after the one at the worker shall leave: early enough that the worker never waits, late enough for newcomers.

A request that arrives while a step runs can still enter the next one as long as that has not been planned. So the plan leaves when
the step at the worker is expected to take only `LEAD_SHARE` of its time more. A guess that is too low costs a newcomer that share
of a step at most; one that is too high costs the worker a wait, as if there were no running ahead.
"""

from __future__ import annotations

from typing import Final

LEAD_SHARE: Final = 0.25
"""Share of a step, at its end, in which the next plan has left."""
LEAD_MIN_NS: Final = 5_000_000
"""Never less than this: on a busy machine a process may have to wait so long for a core."""
_WEIGHT: Final = 0.3
"""Of the latest step in the averages."""
_GROWTH_MAX: Final = 2.0
"""A pause of the machine counts as no more than a step of twice the usual length."""


class StepPacer:
    """Learns the time of one lane's steps."""

    def __init__(self) -> None:
        self._decode_ns = 0.0
        self._token_ns = 0.0

    def record(self, num_extra_tokens: int, duration_ns: int) -> None:
        """Take a step's time in.

        Args:
            num_extra_tokens: Tokens it computed beyond one a row: those of prompts.
            duration_ns: Its time at the worker.
        """
        if num_extra_tokens:
            self._token_ns = _average(self._token_ns, max(0.0, duration_ns - self._decode_ns) / num_extra_tokens)
        else:
            self._decode_ns = _average(self._decode_ns, duration_ns)

    def leave_after_ns(self, num_extra_tokens: int) -> int:
        """How long after the begin of a step of this kind the next plan shall leave; zero for at once."""
        expected_ns = self._decode_ns + self._token_ns * num_extra_tokens
        return max(0, int(expected_ns - max(LEAD_MIN_NS, LEAD_SHARE * expected_ns)))


def _average(average: float, value: float) -> float:
    if not average:
        return value
    return average + _WEIGHT * (min(value, _GROWTH_MAX * average) - average)
