"""Everything that descends from this process, as /proc shows it: reaping orphans, killing strays, proof that none is left.

As child subreaper (or pid 1) the supervisor becomes the parent of every orphan below it, so its descendants are exactly its
tree, whatever the members of that tree forked, daemonised or renamed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import structlog

from headrace.supervision.process_table import ProcessEntry, descendants, kill_entry, read_table

log = structlog.get_logger(__name__)

_REAP_INTERVAL_S = 0.5
_KILL_DEADLINE_S = 5.0
_POLL_S = 0.02


class Offspring:
    """The descendants of this process."""

    def __init__(self, *, own_pids: Callable[[], set[int]], guard_pid: Callable[[], int | None]) -> None:
        """Args are asked anew each time: children whose exit status others take, and the guard, which is not counted."""
        self._own_pids = own_pids
        self._guard_pid = guard_pid

    def alive(self) -> list[ProcessEntry]:
        """Live descendants without the guard. Empty is the proof that nothing is left."""
        table = read_table()
        guard_pid = self._guard_pid()
        found = descendants(table, {os.getpid()})
        return [table[pid] for pid in sorted(found) if pid != guard_pid and table[pid].is_alive]

    def kill_all(self) -> None:
        """Kill every live descendant, without an event loop: strays after an orderly stop, all of them after an error."""
        begin = time.monotonic()
        while left := self.alive():
            if time.monotonic() - begin > _KILL_DEADLINE_S:
                log.error("supervisor.left_behind", left=[repr(entry) for entry in left], is_killed=False)
                return
            for entry in left:
                if kill_entry(entry):
                    log.warning("supervisor.left_behind", left=[repr(entry)], is_killed=True)
            time.sleep(_POLL_S)

    async def keep_reaping(self) -> None:
        """Reap orphans now and then; runs until cancelled."""
        while True:
            await asyncio.sleep(_REAP_INTERVAL_S)
            self.reap()

    def reap(self) -> None:
        """Take the exit statuses of ended orphans, so that no zombie stays."""
        while True:
            try:
                # A look without taking: our own children's statuses belong to their Popen objects.
                waiting = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            # One of our own that waits hides others for a moment only: its pidfd is about to have it taken.
            if waiting is None or waiting.si_pid in self._own_pids() or waiting.si_pid == self._guard_pid():
                return
            os.waitpid(waiting.si_pid, 0)
            log.debug("orphan.reaped", orphan_pid=waiting.si_pid)
