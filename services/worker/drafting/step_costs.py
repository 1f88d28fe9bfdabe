"""What a step costs by the drafts it carries, measured: whether a draft that may be wrong is worth computing.

A step takes the time of its rows, and for each draft a further time that depends on how many tokens the step has: nothing while it
is bound by memory, the same again for each when it is bound by arithmetic. Times without drafts are kept by the number of rows,
between which a straight line is drawn; times of a draft by the size of the step, whoever its rows are, so that few steps are spent
on learning them. A draft of which nothing is known is hoped to cost nothing: so it is tried, and then it is known.

What says that drafts are dear cannot be corrected while none are verified. So the time of a draft is believed to halve for each
while in which none was met at that size: sooner or later those that are likeliest to be right are tried again.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from headrace.latest_times import LatestTimes

Float64Array = npt.NDArray[np.float64]

_FORGOTTEN_STEPS: Final = 1000
"""A number of rows that was not met without drafts in so many steps is not known any more."""
_HALVING_STEPS: Final = 200
"""In so many steps without a draft of that size, its time halves. With a step of 10 ms, a try every few seconds."""


class StepCosts:
    """Times of decode steps at this worker."""

    def __init__(self) -> None:
        # By number of rows, the time without drafts; by size of the step, the time of each draft.
        self._plain: dict[int, LatestTimes] = {}
        self._drafts: dict[int, LatestTimes] = {}
        self._num_steps = 0

    def record(self, *, num_rows: int, num_drafts: int, duration_ns: int) -> None:
        """A step without prompts took that long."""
        self._num_steps += 1
        plain_ns = self._plain_ns(num_rows)
        if num_drafts and plain_ns is not None:
            size = _size(num_rows + num_drafts)
            draft_ns = max(0.0, (duration_ns - plain_ns) / num_drafts)
            self._drafts.setdefault(size, LatestTimes(_HALVING_STEPS)).add(draft_ns, self._num_steps)
        else:
            # Where every step has drafts, because a sequence asked for all of them, they are taken for free.
            self._plain.setdefault(num_rows, LatestTimes(_FORGOTTEN_STEPS)).add(duration_ns, self._num_steps)

    def expected_ns(self, *, num_rows: int, least_drafts: int, most_drafts: int) -> Float64Array | None:
        """Expected times of steps with `least_drafts`, … `most_drafts` drafts; None while those without any are not known."""
        plain_ns = self._plain_ns(num_rows)
        if plain_ns is None:
            return None
        first, last = _size(num_rows + least_drafts), _size(num_rows + most_drafts)
        by_size = np.array([self._draft_ns(size) for size in range(first, last + 1)])
        wanted = np.arange(least_drafts, most_drafts + 1)
        # The same sizes as `_size` gives.
        sizes = np.frexp(num_rows + wanted)[1]
        # A further draft never makes a step shorter.
        found: Float64Array = np.maximum.accumulate(plain_ns + wanted * by_size[sizes - first])
        return found

    def _plain_ns(self, num_rows: int) -> float | None:
        """Expected time of a step with so many rows and no drafts; None where neither it is known nor what is above and below."""
        if (own := self._plain.get(num_rows)) is not None and self._is_fresh(own):
            return own.time_ns
        known = sorted((rows, found.time_ns) for rows, found in self._plain.items() if self._is_fresh(found))
        if not known or not known[0][0] <= num_rows <= known[-1][0]:
            return None
        rows, times = zip(*known, strict=True)
        return float(np.interp(num_rows, rows, times))

    def _is_fresh(self, found: LatestTimes) -> bool:
        return found.is_known and self._num_steps - found.last_step <= _FORGOTTEN_STEPS

    def _draft_ns(self, size: int) -> float:
        """Expected time of each draft in a step of that size, by the nearest size that is known."""
        nearest = min(
            (known for known, found in self._drafts.items() if found.is_known), key=lambda k: (abs(k - size), k), default=None
        )
        if nearest is None:
            return 0.0
        found = self._drafts[nearest]
        halvings: int = (self._num_steps - found.last_step) // _HALVING_STEPS
        return found.time_ns * 0.5**halvings


def _size(num_tokens: int) -> int:
    """Which size a step of so many tokens is: one more for each doubling."""
    return num_tokens.bit_length()
