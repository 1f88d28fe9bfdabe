"""Is this process getting anywhere? Pure: the clock is an argument, a reason comes out.

Three rules, one deadline at a time:
- until it is started, a process must say so within the start timeout; every *change* of its progress counters while it
  starts (tensors loaded, say) begins the timeout anew, so a slow load is not a stuck one;
- once it has reported progress, it must go on reporting within the stall timeout (heartbeats);
- while it reports itself busy, its counters must change within the stall timeout: a heartbeat alone is no progress.
"""

from __future__ import annotations

from collections.abc import Mapping

_NS = 1_000_000_000


class ProgressWatch:
    """The deadline of one process life."""

    def __init__(self, *, start_timeout_s: float, stall_timeout_s: float | None, now_ns: int) -> None:
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._is_started = False
        self._has_reported = False
        self._is_busy = False
        self._counters: dict[str, float] = {}
        self._heard_ns = now_ns
        self._changed_ns = now_ns

    def on_started(self, now_ns: int) -> None:
        """The process said `started`; from here the stall rules hold instead of the start timeout."""
        self._is_started = True
        self._heard_ns = self._changed_ns = now_ns

    def on_progress(self, counters: Mapping[str, float], *, is_busy: bool, now_ns: int) -> None:
        """A progress notification arrived."""
        self._has_reported = True
        self._heard_ns = now_ns
        # Work that begins after an idle time gets the whole timeout for its first step.
        if dict(counters) != self._counters or (is_busy and not self._is_busy):
            self._changed_ns = now_ns
        self._counters = dict(counters)
        self._is_busy = is_busy

    def deadline_ns(self) -> int | None:
        """When `verdict` will first say something if nothing more is heard; None for never."""
        if not self._is_started:
            return self._changed_ns + int(self._start_timeout_s * _NS)
        if self._stall_timeout_s is None or not self._has_reported:
            return None
        since_ns = min(self._heard_ns, self._changed_ns) if self._is_busy else self._heard_ns
        return since_ns + int(self._stall_timeout_s * _NS)

    def verdict(self, now_ns: int) -> str | None:
        """Why the process counts as stuck at `now_ns`, or None while it does not."""
        deadline_ns = self.deadline_ns()
        if deadline_ns is None or now_ns < deadline_ns:
            return None
        if not self._is_started:
            return f"not started within {self._start_timeout_s:g} s of its spawn or last progress"
        assert self._stall_timeout_s is not None
        if now_ns - self._heard_ns >= self._stall_timeout_s * _NS:
            return f"no heartbeat for {(now_ns - self._heard_ns) / _NS:.1f} s (limit {self._stall_timeout_s:g} s)"
        counters = ", ".join(f"{name}={value:g}" for name, value in sorted(self._counters.items())) or "none"
        standstill_s = (now_ns - self._changed_ns) / _NS
        return f"busy without progress for {standstill_s:.1f} s (limit {self._stall_timeout_s:g} s; counters: {counters})"
