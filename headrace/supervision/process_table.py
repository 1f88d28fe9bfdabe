"""What /proc says about processes: who is alive, who descends from whom, who carries our mark. And killing one surely.

The supervisor and its guard both look here instead of trusting their own bookkeeping. A process is ours when it descends
from the supervisor, sits in the session or group of a child, or carries the supervision mark in its environment: the mark
survives a double fork with setsid and the supervisor's own death, after which parent pids tell nothing.

Only `os` and `signal` are imported: the guard must start in milliseconds and stay small.
"""

from __future__ import annotations

import os
import signal

MARK_VARIABLE = "HEADRACE_SUPERVISION_MARK"
"""Environment variable naming every supervised life a process belongs to, outermost first, joined by `/`."""

_MARK_PREFIX = MARK_VARIABLE.encode() + b"="


class ProcessEntry:
    """One process as /proc/<pid>/stat shows it. Pid and start time together name it for as long as the machine runs."""

    __slots__ = ("name", "parent_pid", "pgid", "pid", "session_id", "start_ticks", "state")

    def __init__(self, pid: int, stat: str) -> None:
        # The name stands in brackets and may itself hold brackets and blanks, so the fields start after the last one.
        opening, closing = stat.index("("), stat.rindex(")")
        fields = stat[closing + 2 :].split()
        self.pid = pid
        self.name = stat[opening + 1 : closing]
        self.state = fields[0]
        self.parent_pid = int(fields[1])
        self.pgid = int(fields[2])
        self.session_id = int(fields[3])
        self.start_ticks = int(fields[19])

    @property
    def is_alive(self) -> bool:
        """False for a zombie: it holds nothing but its exit status."""
        return self.state not in "ZX"

    def __repr__(self) -> str:
        return f"{self.name}[{self.pid}] state={self.state} parent={self.parent_pid} session={self.session_id}"


def read_entry(pid: int) -> ProcessEntry | None:
    """The process `pid` now, or None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessEntry(pid, stat.decode("utf-8", "replace"))


def read_table() -> dict[int, ProcessEntry]:
    """Every process of this pid namespace, zombies included."""
    entries = (read_entry(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {entry.pid: entry for entry in entries if entry is not None}


def read_marks(pid: int) -> tuple[str, ...]:
    """The supervised lives `pid` belongs to by its environment at exec; empty when unmarked, gone or not readable."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environ = file.read()
    except OSError:
        # Gone meanwhile, another user's, or between two programs in execve: the caller looks again.
        return ()
    for variable in environ.split(b"\0"):
        if variable.startswith(_MARK_PREFIX):
            return tuple(variable[len(_MARK_PREFIX) :].decode("utf-8", "replace").split("/"))
    return ()


def descendants(table: dict[int, ProcessEntry], roots: set[int]) -> set[int]:
    """Pids in `table` whose chain of parents leads to one of `roots`; the roots themselves are left out."""
    children: dict[int, list[int]] = {}
    for entry in table.values():
        children.setdefault(entry.parent_pid, []).append(entry.pid)
    found: set[int] = set()
    frontier = list(roots)
    while frontier:
        for pid in children.get(frontier.pop(), ()):
            if pid not in found and pid not in roots:
                found.add(pid)
                frontier.append(pid)
    return found


def kill_entry(entry: ProcessEntry, signum: int = signal.SIGKILL) -> bool:
    """Signal exactly the process that `entry` described, never a later one that got its pid.

    Returns:
        True when the signal was sent, False when that process is gone or is not ours to signal.
    """
    try:
        pidfd = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return False
    try:
        # The pidfd pins whoever has the pid now; only then is it compared with who was meant.
        current = read_entry(entry.pid)
        if current is None or current.start_ticks != entry.start_ticks:
            return False
        signal.pidfd_send_signal(pidfd, signum)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(pidfd)
    return True
