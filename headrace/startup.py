"""What a start spends its time on: phases of a process, from its spawn to the moment that it is ready first. Told the time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_STAT: Final = Path("/proc/self/stat")
_START_FIELD: Final = 19
"""Index of the start time among the fields after the command's name, see proc_pid_stat(5)."""


class StartPhases:
    """Phases that follow one another; none is open twice.

    Args:
        begun_ns: When the first begins, monotonic nanoseconds.
    """

    def __init__(self, begun_ns: int) -> None:
        self._begun_ns = self._last_ns = begun_ns
        self._phases: dict[str, int] = {}

    def end(self, name: str, now_ns: int) -> None:
        """End the phase that began when the last one ended; what has this name already becomes longer."""
        self._phases[name] = self._phases.get(name, 0) + now_ns - self._last_ns
        self._last_ns = now_ns

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in order, and of all together as `total`."""
        spent = {name: round(nanoseconds / 1e9, 3) for name, nanoseconds in self._phases.items()}
        return spent | {"total": round((self._last_ns - self._begun_ns) / 1e9, 3)}


def spawned_ns(now_ns: int, *, boot_now_ns: int, ticks_per_s: int, stat: Path = _STAT) -> int:
    """Give when this process was spawned, on the monotonic clock; to a hundredth of a second, and `now_ns` where it cannot be told.

    Args:
        now_ns: Monotonic clock.
        boot_now_ns: The same moment on the clock that counts from boot.
        ticks_per_s: The kernel's ticks.
        stat: The process's file of that name.
    """
    try:
        # The command's name stands in brackets and may hold spaces.
        ticks = int(stat.read_text().rpartition(")")[2].split()[_START_FIELD])
    except (OSError, ValueError, IndexError):
        return now_ns
    return min(now_ns, now_ns - boot_now_ns + ticks * 1_000_000_000 // ticks_per_s)
