"""How fast a queue drains: an exponentially weighted rate, and the wait it means for somebody who is refused."""

from __future__ import annotations

import math

_NS_PER_S = 1_000_000_000


class DrainRate:
    """Units that leave a queue per second, recent ones weighing more.

    Args:
        window_s: Time after which a departure weighs 1/e.
        retry_after_s_min: Shortest wait that is advised.
        retry_after_s_max: Longest wait that is advised, also where nothing has left yet.
    """

    def __init__(self, *, window_s: float = 10.0, retry_after_s_min: float = 1.0, retry_after_s_max: float = 60.0) -> None:
        self._window_s = window_s
        self._retry_after_s_min = retry_after_s_min
        self._retry_after_s_max = retry_after_s_max
        self._weighted_count = 0.0
        self._first_ns: int | None = None
        self._last_ns = 0

    def record(self, count: int, now_ns: int) -> None:
        """Note that `count` units have left."""
        if self._first_ns is None:
            self._first_ns = self._last_ns = now_ns
        self._decay(now_ns)
        self._weighted_count += count

    def per_second(self, now_ns: int) -> float:
        """Units a second, zero before the first has left."""
        if self._first_ns is None:
            return 0.0
        self._decay(now_ns)
        # A window that is not full yet would read too low; at least a tenth of a second, so that one departure is no torrent.
        elapsed_s = max(0.1, (self._last_ns - self._first_ns) / _NS_PER_S)
        return self._weighted_count / (self._window_s * -math.expm1(-elapsed_s / self._window_s))

    def seconds_for(self, count: int, now_ns: int) -> float:
        """Seconds in which `count` units will have left, within the bounds of sensible advice."""
        rate = self.per_second(now_ns)
        if rate * self._retry_after_s_max <= count:
            return self._retry_after_s_max
        return max(self._retry_after_s_min, count / rate)

    def _decay(self, now_ns: int) -> None:
        # A clock that jumps back must not make old departures weigh more.
        elapsed_ns = now_ns - self._last_ns
        if elapsed_ns > 0:
            self._weighted_count *= math.exp(-elapsed_ns / (self._window_s * _NS_PER_S))
            self._last_ns = now_ns
