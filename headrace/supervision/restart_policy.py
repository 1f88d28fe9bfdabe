"""When to start a dead process again, and when to give up. Pure: the clock is an argument.

Delays grow exponentially with each restart in a row and fall back to the initial one after a healthy life. Independent of
that, restarts are counted in a sliding window: more than the limit in it is a crash loop, which restarting will not cure.
"""

from __future__ import annotations

from collections import deque

from headrace.supervision.limits import SupervisionLimits

_NS = 1_000_000_000


class RestartPolicy:
    """Backoff and crash-loop limit of one process."""

    def __init__(self, limits: SupervisionLimits) -> None:
        self._limits = limits
        self._started_ns: int | None = None
        self._num_in_a_row = 0
        self._restarts_ns: deque[int] = deque()

    @property
    def num_recent_restarts(self) -> int:
        """Restarts granted within the crash-loop window that ends at the last exit."""
        return len(self._restarts_ns)

    def on_started(self, now_ns: int) -> None:
        """The process said `started`: its healthy period begins."""
        self._started_ns = now_ns

    def on_exit(self, now_ns: int) -> float | None:
        """The process ended.

        Args:
            now_ns: Monotonic clock, nanoseconds.

        Returns:
            Seconds to wait before it is started again, or None to give up.
        """
        limits = self._limits
        if self._started_ns is not None and now_ns - self._started_ns >= limits.healthy_after_s * _NS:
            self._num_in_a_row = 0
        self._started_ns = None
        while self._restarts_ns and now_ns - self._restarts_ns[0] >= limits.crash_loop_window_s * _NS:
            self._restarts_ns.popleft()
        if len(self._restarts_ns) >= limits.crash_loop_restarts:
            return None
        self._restarts_ns.append(now_ns)
        delay_s = backoff_s(self._num_in_a_row, initial_s=limits.backoff_initial_s, max_s=limits.backoff_max_s)
        self._num_in_a_row += 1
        return delay_s


def backoff_s(num_before: int, *, initial_s: float, max_s: float) -> float:
    """Delay after `num_before` restarts in a row: `initial_s` doubled that often, at most `max_s`."""
    # Beyond 2**63 any initial delay is over any maximum; the cap keeps the power from overflowing a float.
    return min(max_s, initial_s * 2.0 ** min(num_before, 63))
