"""What a step costs by the drafts it carries, measured: whether a draft that may be wrong is worth computing.

Times are kept by the rows of a step and by its drafts, each in buckets that are exact where they are small. Between two numbers of
drafts that are known a straight line is drawn, and beyond the last one on; with none known, drafts are hoped to cost nothing: so
they are tried, and then it is known.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_NUM_TRIES: Final = 3
"""Steps of a bucket before its time is believed: the first of a size may prepare kernels."""
_NUM_KEPT: Final = 16
"""Latest steps of a bucket that count; its time is their lower quartile, for whatever interrupts a step makes it longer."""
_OLD_STEPS: Final = 2000
"""A bucket that was not met in so many steps is not known any more."""


class _Bucket:
    __slots__ = ("durations_ns", "last_step", "time_ns")

    def __init__(self) -> None:
        self.durations_ns: deque[int] = deque(maxlen=_NUM_KEPT)
        self.time_ns = 0
        self.last_step = 0

    def add(self, duration_ns: int, step: int) -> None:
        self.last_step = step
        self.durations_ns.append(duration_ns)
        self.time_ns = sorted(self.durations_ns)[len(self.durations_ns) // 4]


class StepCosts:
    """Times of decode steps at this worker."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, _Bucket]] = {}
        self._num_steps = 0

    def record(self, *, num_rows: int, num_drafts: int, duration_ns: int) -> None:
        """A step without prompts took that long."""
        self._num_steps += 1
        buckets, place = self._buckets.setdefault(_bucket(num_rows), {}), _bucket(num_drafts)
        bucket = buckets.get(place)
        if bucket is None or self._num_steps - bucket.last_step > _OLD_STEPS:
            bucket = buckets[place] = _Bucket()
        bucket.add(duration_ns, self._num_steps)

    def expected_ns(self, *, num_rows: int, least_drafts: int, most_drafts: int) -> Float64Array | None:
        """Expected times of steps with `least_drafts`, … `most_drafts` drafts; None while the first is not known."""
        known = sorted(
            (num_drafts, bucket.time_ns)
            for num_drafts, bucket in self._buckets.get(_bucket(num_rows), {}).items()
            if len(bucket.durations_ns) >= _NUM_TRIES and self._num_steps - bucket.last_step <= _OLD_STEPS
        )
        if not known or known[0][0] > least_drafts:
            return None
        numbers, times = np.array(known, dtype=np.float64).T
        # A draft never makes a step shorter; what says so was met when the machine was faster.
        times = np.maximum.accumulate(times)
        wanted = np.arange(least_drafts, most_drafts + 1)
        found: Float64Array = np.interp(wanted, numbers, times)
        if len(known) > 1:
            slope = (times[-1] - times[-2]) / (numbers[-1] - numbers[-2])
            found += slope * np.maximum(0.0, wanted - numbers[-1])
        return found


def _bucket(number: int) -> int:
    """The bucket of a number, named by the smallest it holds: each by itself up to 16, then eight to a doubling."""
    if number <= 16:
        return number
    step: int = 1 << (number.bit_length() - 4)
    return number // step * step
