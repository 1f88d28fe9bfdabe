"""The standby of a member: its next life, spawned ahead, that has done the slow part of its start and waits for its turn.

It must need nothing that the running life holds (ports, a model's memory), and it says nothing until its turn has come, so that
neither start timeout nor stall timeout counts before. It is replaced when it ends, with the same patience as any life.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from headrace.supervision.limits import SupervisionLimits
from headrace.supervision.process import Process
from headrace.supervision.restart_policy import RestartPolicy

log = structlog.get_logger(__name__)

_NS = 1_000_000_000


class Standby:
    """At most one process that stands by.

    Args:
        limits: For the patience with one that ends.
        spawn: Starts one.
        closed: Told when nothing of one is left.
    """

    def __init__(self, limits: SupervisionLimits, *, spawn: Callable[[], Process], closed: Callable[[Process], None]) -> None:
        self._limits = limits
        self._spawn = spawn
        self._closed = closed
        self._policy = RestartPolicy(limits)
        self._process: Process | None = None
        self._due_ns: int | None = 0

    def due_in_s(self) -> float | None:
        """Seconds until `keep` has something to do; None when only the end of the process gives it something."""
        if self._process is not None or self._due_ns is None:
            return None
        return max(0.0, (self._due_ns - time.monotonic_ns()) / _NS)

    async def keep(self) -> None:
        """Replace one that has ended, and start one where none is."""
        now_ns = time.monotonic_ns()
        if self._process is not None and self._process.returncode is not None:
            reason = self._process.exit_reason
            await self._discard(self._process)
            self._set_due(now_ns, reason)
        if self._process is None and self._due_ns is not None and now_ns >= self._due_ns:
            try:
                self._process = self._spawn()
            except OSError as error:
                self._set_due(now_ns, f"cannot be started: {error}")

    async def take(self) -> Process | None:
        """Give the one that stands by its turn; None when there is none, and the next life must be spawned as usual."""
        process = self._process
        if process is None:
            return None
        if process.returncode is not None:
            await self._discard(process)
            return None
        self._process = None
        self._policy = RestartPolicy(self._limits)
        self._due_ns = 0
        process.give_turn()
        return process

    async def end(self) -> None:
        """Stop the one that stands by; it holds nothing that it would have to drain."""
        if self._process is not None:
            seconds = self._limits.term_deadline_s
            await self._process.stop(drain_deadline_s=seconds, term_deadline_s=seconds, reason="no longer needed")
            await self._discard(self._process)

    async def _discard(self, process: Process) -> None:
        await process.sweep()
        self._closed(process)
        self._process = None

    def _set_due(self, now_ns: int, reason: str) -> None:
        delay_s = self._policy.on_exit(now_ns)
        log.warning("process.standby_lost", reason=reason, delay_s=delay_s)
        self._due_ns = None if delay_s is None else now_ns + int(delay_s * _NS)
