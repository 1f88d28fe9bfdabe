"""One place in the supervised tree: the lives of one process, one after the other.

Decides when a life has failed (it ended, was not started in time, stalled) and whether another one follows. The deadlines
come from ProgressWatch and the delays from RestartPolicy, both pure; the signals go through Process. What happens to the
rest of the tree is the supervisor's business: a member only reports a `Failure`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from headrace.lifecycle import State, can_change
from headrace.supervision.exit_status import ExitStatus, describe_exit
from headrace.supervision.limits import ProcessSpec, SupervisionLimits
from headrace.supervision.notification import Notification
from headrace.supervision.process import Process
from headrace.supervision.progress_watch import ProgressWatch
from headrace.supervision.restart_policy import RestartPolicy
from headrace.supervision.standby import Standby

log = structlog.get_logger(__name__)

DUMP_WAIT_S = 1.0
_NS = 1_000_000_000


@dataclass(frozen=True)
class Failure:
    """Why the whole tree must stop."""

    name: str
    reason: str
    exit_status: ExitStatus
    stderr_lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MemberCallbacks:
    """The supervisor's side, as a member sees it."""

    spawn: Callable[[ProcessSpec, int, Callable[[], None], bool], Process]
    """Start a life: spec, its number, what to call on a change, whether it stands by first."""
    closed: Callable[[Process], None]
    """A life is over and nothing of it is left."""
    state: Callable[[str, State, str], None]
    failure: Callable[[Failure], None]


class Member:
    """Keeps one spec running until told to stop or beyond hope."""

    def __init__(self, spec: ProcessSpec, limits: SupervisionLimits, callbacks: MemberCallbacks) -> None:
        self.spec = spec
        self.started = asyncio.Event()
        """Set when the process has said `started` for the first time."""
        self.ended = asyncio.Event()
        """Set when no process of this member is left and none will follow."""
        self.is_clean = True
        """Whether the last stop went as asked: within the drain deadline and with a good exit status."""
        self._limits = limits
        self._callbacks = callbacks
        self._policy = RestartPolicy(limits)
        self._wake = asyncio.Event()
        self._stop_reason: str | None = None
        self._is_last_life = False
        self._process: Process | None = None
        self._state: State | None = None
        self._has_started = False
        self._watch: ProgressWatch | None = None
        self._num_lives = 0
        self._num_spawned = 0
        self._standby = Standby(limits, spawn=lambda: self._spawn(is_standby=True), closed=callbacks.closed)

    async def run(self) -> None:
        """Start the process, and again after each end, until stopped or failed."""
        try:
            while not self._is_last_life and await self._live_once():
                log.debug("process.life_follows", process=self.spec.name, life=self._num_lives + 1)
        finally:
            await self._standby.end()
            self.ended.set()

    def end_with_this_life(self) -> None:
        """The tree is stopping: no further life follows, though this one's turn to stop may be later."""
        self._is_last_life = True
        # Whoever waits for this one's start gives up as well.
        self.started.set()
        self._wake.set()

    def request_stop(self, reason: str) -> None:
        """Drain and end the process; `ended` tells when that is done."""
        self.end_with_this_life()
        if self._stop_reason is None:
            self._stop_reason = reason

    def kill_now(self, reason: str) -> None:
        """End the process group at once, whatever step a stop is at."""
        self.request_stop(reason)
        if self._process is not None and self._process.returncode is None:
            self._process.signal(signal.SIGKILL, reason=reason, to_group=True)

    async def _live_once(self) -> bool:
        """One life from spawn to nothing left; True when another one shall follow."""
        self._num_lives += 1
        self._state = None
        self._has_started = False
        self._watch = ProgressWatch(
            start_timeout_s=_first_given(self.spec.start_timeout_s, self._limits.start_timeout_s),
            stall_timeout_s=self.spec.stall_timeout_s,
            now_ns=time.monotonic_ns(),
        )
        try:
            process = await self._standby.take() or self._spawn(is_standby=False)
        except OSError as error:
            return await self._after_end(f"cannot be started: {error}", None)
        self._process = process
        self._tell(State.STARTING, f"pid {process.pid}")
        try:
            stuck_reason = await self._follow(process)
            if self._stop_reason is not None and process.returncode is None:
                await self._stop(process, self._stop_reason)
                return False
            if stuck_reason is not None:
                await self._kill_stuck(process, stuck_reason)
            await process.sweep(grace_s=0.0)
        finally:
            self._callbacks.closed(process)
        if process.returncode is None:
            self.is_clean = False
            self._tell_end("cannot be killed", is_clean=False)
            return False
        reason = describe_exit(process.returncode)
        return await self._after_end(f"{stuck_reason}; {reason}" if stuck_reason is not None else reason, process)

    def _spawn(self, *, is_standby: bool) -> Process:
        self._num_spawned += 1
        return self._callbacks.spawn(self.spec, self._num_spawned, self._wake.set, is_standby)

    async def _follow(self, process: Process) -> str | None:
        """Watch a running process until it ends, a stop is asked for (None), or it is stuck (the reason)."""
        assert self._watch is not None
        while True:
            # As of now, but only after the socket was emptied: a supervisor that was itself held up must not blame the child.
            now_ns = time.monotonic_ns()
            for notification in process.take_notifications():
                self._on_notification(notification)
            if process.returncode is not None or self._stop_reason is not None:
                return None
            if (reason := self._watch.verdict(now_ns)) is not None:
                return f"{reason}, process is {process.describe_state()}"
            deadline_ns = self._watch.deadline_ns()
            timeout_s = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / _NS)
            # A standby must not compete with the start of the one that it is to follow.
            if self.spec.has_standby and self._state is State.READY and not self._is_last_life:
                await self._standby.keep()
                timeout_s = _earlier(timeout_s, self._standby.due_in_s())
            await self._sleep(timeout_s)

    async def _sleep(self, timeout_s: float | None) -> None:
        """Until something changes or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._wake.clear()

    def _on_notification(self, notification: Notification) -> None:
        assert self._watch is not None
        now_ns = time.monotonic_ns()
        if notification.progress is not None:
            self._watch.on_progress(notification.progress, is_busy=notification.is_busy, now_ns=now_ns)
        if notification.state is None:
            return
        if self._state is not None and not can_change(self._state, notification.state):
            log.warning("process.state_rejected", process=self.spec.name, old=self._state.value, new=notification.state.value)
            return
        if notification.state is State.STARTED and self._state is State.STARTING:
            self._watch.on_started(now_ns)
            self._policy.on_started(now_ns)
            self._has_started = True
            self.started.set()
        self._tell(notification.state, notification.detail)

    def _tell(self, state: State, detail: str) -> None:
        is_new = state is not self._state
        self._state = state
        if is_new:
            log.info("process.state_changed", process=self.spec.name, state=state.value, detail=detail)
        self._callbacks.state(self.spec.name, state, detail)

    async def _stop(self, process: Process, reason: str) -> None:
        drain_deadline_s = _first_given(self.spec.drain_deadline_s, self._limits.drain_deadline_s)
        term_deadline_s = self._limits.term_deadline_s
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(
                process.stop(drain_deadline_s=drain_deadline_s, term_deadline_s=term_deadline_s, reason=reason)
            )
            stopping.add_done_callback(lambda _: self._wake.set())
            while not stopping.done():
                await self._sleep(None)
                for notification in process.take_notifications():
                    self._on_notification(notification)
        stage = stopping.result()
        # A process whose own handler is not yet in place dies by our SIGTERM, as asked.
        self.is_clean = stage == "drained" and process.returncode in (0, -signal.SIGTERM)
        self._tell_end(process.exit_reason, is_clean=self.is_clean)

    async def _kill_stuck(self, process: Process, reason: str) -> None:
        """Have the process dump its stacks to stderr (attach() sees to that), then kill its group."""
        event = "process.stalled" if self._has_started else "process.start_timed_out"
        log.error(event, process=self.spec.name, process_pid=process.pid, reason=reason)
        process.signal(signal.SIGUSR1, reason="dump stacks before the kill")
        # A stopped process sees the dump signal only when it goes on.
        process.signal(signal.SIGCONT, reason="deliver SIGUSR1")
        await process.wait(DUMP_WAIT_S)
        process.signal(signal.SIGKILL, reason=reason, to_group=True)
        if not await process.wait(self._limits.term_deadline_s):
            log.error("process.unkillable", process=self.spec.name, process_pid=process.pid, state=process.describe_state())
            while process.returncode is None and self._stop_reason is None:
                await self._sleep(None)

    def _tell_end(self, reason: str, *, is_clean: bool) -> None:
        final = State.STOPPED if is_clean else State.FAILED
        if self._state not in (State.STOPPED, State.FAILED) or self._state is not final:
            self._tell(final, reason)

    async def _after_end(self, reason: str, process: Process | None) -> bool:
        """An end that nobody asked for: report it, and wait for the next life if there is to be one."""
        returncode = process.returncode if process is not None else None
        lines = process.stderr_lines if process is not None else []
        said = self._state
        self._process = None
        # Told to stop by someone else's SIGTERM, it said so and ended well: that is no failure.
        is_clean = returncode == 0 and said in (State.DRAINING, State.STOPPED)
        self._tell_end(reason, is_clean=is_clean)
        if self._is_last_life:
            self.is_clean = returncode in (0, -signal.SIGTERM)
            return False
        is_first_start = not self.started.is_set()
        status = _fatal_status(
            returncode=returncode,
            has_started=self._has_started,
            is_first_start=is_first_start,
            restart=self.spec.restart,
            is_clean=is_clean,
        )
        if status is not None:
            when = " before it was started" if status is ExitStatus.START_FAILED else ""
            self._callbacks.failure(Failure(self.spec.name, f"{reason}{when}", status, lines))
            return False
        delay_s = self._policy.on_exit(time.monotonic_ns())
        if delay_s is None:
            limit = f"{self._limits.crash_loop_restarts} restarts within {self._limits.crash_loop_window_s:g} s"
            text = f"crash loop: more than {limit}; last: {reason}"
            log.error("process.crash_looped", process=self.spec.name, reason=text)
            self._callbacks.failure(Failure(self.spec.name, text, ExitStatus.CRASH_LOOP, lines))
            return False
        log.warning("process.restarting", process=self.spec.name, reason=reason, delay_s=delay_s, num_restarts=self._num_lives)
        if lines:
            log.warning("process.stderr_tail", process=self.spec.name, lines=lines)
        await self._wait_delay(delay_s)
        return True

    async def _wait_delay(self, delay_s: float) -> None:
        until = time.monotonic() + delay_s
        while not self._is_last_life and (rest_s := until - time.monotonic()) > 0:
            await self._sleep(rest_s)


def _earlier(a_s: float | None, b_s: float | None) -> float | None:
    return min((value for value in (a_s, b_s) if value is not None), default=None)


def _first_given(own_s: float | None, default_s: float) -> float:
    return default_s if own_s is None else own_s


def _fatal_status(
    *, returncode: int | None, has_started: bool, is_first_start: bool, restart: str, is_clean: bool
) -> ExitStatus | None:
    """The exit status with which this end must end the whole tree whatever the restart policy says, or None."""
    if not has_started and returncode == ExitStatus.CONFIG_ERROR:
        return ExitStatus.CONFIG_ERROR
    if not has_started and is_first_start:
        return ExitStatus.START_FAILED
    if restart == "never":
        return ExitStatus.CLEAN if is_clean else ExitStatus.CHILD_DIED
    return None
