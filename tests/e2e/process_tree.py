"""What /proc says of a server's processes. No bookkeeping of the server's own is consulted.

Every process of a tree inherits the run directory in its environment, whatever its parent is by then, so a tree is found by
that mark: orphans and daemons too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_START_TIME = 18
"""Place of the start time in /proc/<pid>/stat after the state."""


def processes_marked(mark: str) -> dict[int, str]:
    """Live processes whose environment holds the mark, with their command lines, the oldest first.

    Zombies are not counted: they hold nothing.
    """
    found: list[tuple[int, int, str]] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            state, *fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            # It ended, or is not ours to look at.
            continue
        if mark.encode() in environment and state != "Z":
            found.append((int(fields[_START_TIME]), int(entry.name), command))
    return {pid: command for _, pid, command in sorted(found)}


def listening_ports() -> set[int]:
    """TCP ports that are listened on."""
    ports: set[int] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def wait_until(condition: Callable[[], object], timeout_s: float, what: str, *, interval_s: float = 0.05) -> float:
    """Wait for a condition and return how long it took, seconds; AssertionError when it does not come true in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(interval_s)
    return time.monotonic() - start


def kill(pid: int) -> None:
    """SIGKILL to one process alone."""
    os.kill(pid, signal.SIGKILL)
