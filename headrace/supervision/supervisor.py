"""The supervisor: a list of processes started in order, kept running, and ended with nothing left.

    signal → recorded → acted on in the loop ─┐
    member failed for good ───────────────────┼→ stop asked for → members stop in reverse order → /proc shows nothing left
    request_stop() ───────────────────────────┘

`headrace serve`, each container's entry process and a worker's launcher (for its ranks) are all this class. It owns what all
members share: the lifeline pipe, the guard, the run directory, the stderr relay, and the duty of reaping orphans, as child
subreaper and possibly as pid 1. Lives, restarts and stalls of one process are in headrace/supervision/member.py.

It must run on the main thread's event loop (the children's parent death signal is bound to the spawning thread), and nothing
else in its process may start processes: what descends from it is ended with it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import structlog

from headrace.lifecycle import State
from headrace.supervision.child import RUN_DIRECTORY_VARIABLE, set_child_subreaper
from headrace.supervision.exit_status import ExitStatus
from headrace.supervision.guard_handle import GuardHandle
from headrace.supervision.limits import ProcessSpec, SupervisionLimits, check_specs
from headrace.supervision.member import Failure, Member, MemberCallbacks
from headrace.supervision.offspring import Offspring
from headrace.supervision.process import Process, SpawnContext
from headrace.supervision.process_table import ProcessEntry
from headrace.supervision.run_directory import RunDirectory
from headrace.supervision.signal_recorder import SignalRecorder
from headrace.supervision.stderr_relay import StderrRelay

log = structlog.get_logger(__name__)

StateCallback = Callable[[str, State, str], None]


class Supervisor:
    """Runs `specs` until told to stop, or until one of them is beyond hope."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        settings: SupervisionLimits,
        on_state: StateCallback | None = None,
        run_directory: Path | None = None,
        handle_signals: bool = True,
        relay: StderrRelay | None = None,
    ) -> None:
        """Prepare; nothing is started before `run`.

        Args:
            specs: The processes, in any order; `start_after` orders them.
            settings: Deadlines and bounds.
            on_state: Called in the event loop with (name, state, detail) for each state of each process.
            run_directory: Claimed at the start, named to the children in HEADRACE_RUN_DIRECTORY, removed at the end.
            handle_signals: False when the caller handles SIGINT and SIGTERM itself and calls `request_stop`.
            relay: Writes to stderr, and is closed at the end; None makes one. A caller that logs through the same one never waits
                for whoever reads there, as the children do not.

        Raises:
            ConfigError: The specs could never all start.
        """
        check_specs(specs)
        self.failure: Failure | None = None
        """Why the tree stopped by itself, after `run`."""
        self._settings = settings
        self._on_state = on_state
        self._run_directory = run_directory
        self._relay = relay
        self._token = secrets.token_hex(8)
        self._members = {spec.name: Member(spec, settings, self._callbacks()) for spec in specs}
        self._wake = asyncio.Event()
        self._signals = SignalRecorder(self._wake.set) if handle_signals else None
        self._stop_reason: str | None = None
        self._is_interrupted = False
        self._context: SpawnContext | None = None
        self._guard: GuardHandle | None = None
        self._processes: dict[int, Process] = {}
        self._offspring = Offspring(
            own_pids=lambda: set(self._processes), guard_pid=lambda: self._guard.pid if self._guard else None
        )

    async def run(self) -> int:
        """Start everything, keep it running, stop it, and prove that nothing is left.

        Returns:
            An `ExitStatus`; 0 only when the stop was asked for and all ended as they should.

        Raises:
            ConfigError: The run directory is in use or unusable; nothing was started.
        """
        assert threading.current_thread() is threading.main_thread(), "the supervisor runs on the main thread"
        relay = self._relay or StderrRelay()
        try:
            with self._signals.installed() if self._signals is not None else nullcontext():
                await self._run_tree(relay)
            return self._exit_status(is_all_gone=not self.verify_nothing_left())
        finally:
            if self.failure is not None:
                relay.write(_failure_text(self.failure).encode())
            relay.close()

    def request_stop(self, reason: str) -> None:
        """Stop everything in order; `run` returns when it is done. A repeated call changes nothing."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._wake.set()

    def verify_nothing_left(self) -> list[ProcessEntry]:
        """Live processes descended from this one, as /proc shows them now; the guard is not counted. Empty is proof."""
        return self._offspring.alive()

    async def _run_tree(self, relay: StderrRelay) -> None:
        set_child_subreaper()
        # Only this process ever holds the write end, so that its end is the pipe's end.
        lifeline_fd, lifeline_write_fd = os.pipe2(os.O_CLOEXEC)
        self._guard = GuardHandle(token=self._token, run_directory=self._run_directory)
        self._context = SpawnContext(self._token, lifeline_fd, relay, self._child_env(), self._settings.stderr_tail_lines)
        with ExitStack() as at_end:
            at_end.callback(os.close, lifeline_fd)
            at_end.callback(os.close, lifeline_write_fd)
            # The guard stands before there is anything to clean up after us, and goes when there is nothing left.
            at_end.callback(self._guard.dismiss)
            await self._guard.start()
            if self._run_directory is not None:
                at_end.enter_context(RunDirectory.claim(self._run_directory))
            at_end.callback(self._end_all)
            async with asyncio.TaskGroup() as group:
                standing = group.create_task(self._guard.keep_standing(), name="guard")
                reaping = group.create_task(self._offspring.keep_reaping(), name="orphans")
                for member in self._members.values():
                    group.create_task(self._start_in_order(member), name=member.spec.name)
                await self._wait_stop()
                group.create_task(self._stop_in_order(), name="stop")
                await self._act_on_signals_until_ended()
                standing.cancel()
                reaping.cancel()

    def _end_all(self) -> None:
        """After an orderly stop this finds strays at most; after an error of our own it ends everything."""
        self._offspring.kill_all()
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        self._offspring.reap()

    async def _start_in_order(self, member: Member) -> None:
        for name in member.spec.start_after:
            await self._members[name].started.wait()
            if self._stop_reason is not None:
                break
        if self._stop_reason is not None:
            member.ended.set()
            return
        await member.run()

    async def _wait_stop(self) -> None:
        while self._stop_reason is None:
            await self._wake.wait()
            self._wake.clear()
            self._act_on_signals()
        log.info("supervisor.stopping", reason=self._stop_reason)

    async def _stop_in_order(self) -> None:
        """Each member is stopped once all have ended that started after it or are to stop before it."""
        assert self._stop_reason is not None
        reason = self._stop_reason
        for member in self._members.values():
            member.end_with_this_life()

        async def stop(member: Member) -> None:
            for later in self._members.values():
                if member.spec.name in (*later.spec.start_after, *later.spec.stop_before):
                    await later.ended.wait()
            member.request_stop(reason)
            await member.ended.wait()

        async with asyncio.TaskGroup() as group:
            for member in self._members.values():
                group.create_task(stop(member))
        self._wake.set()

    async def _act_on_signals_until_ended(self) -> None:
        while not all(member.ended.is_set() for member in self._members.values()):
            await self._wake.wait()
            self._wake.clear()
            self._act_on_signals()

    def _act_on_signals(self) -> None:
        for signum in self._signals.take() if self._signals is not None else ():
            if self._stop_reason is None:
                self.request_stop(signum.name)
            elif signum is signal.SIGINT:
                log.warning("supervisor.interrupted", reason="SIGINT while stopping")
                self._is_interrupted = True
                for member in self._members.values():
                    member.kill_now("second SIGINT")

    def _callbacks(self) -> MemberCallbacks:
        return MemberCallbacks(spawn=self._spawn, closed=self._on_closed, state=self._on_member_state, failure=self._on_failure)

    def _spawn(self, spec: ProcessSpec, life: int, on_change: Callable[[], None], is_standby: bool) -> Process:
        assert self._context is not None and self._guard is not None
        process = Process.spawn(spec, self._context, life=life, on_change=on_change, is_standby=is_standby)
        self._processes[process.pid] = process
        self._guard.open_session(process.pid)
        return process

    def _on_closed(self, process: Process) -> None:
        assert self._guard is not None
        if process.returncode is not None:
            process.close()
            del self._processes[process.pid]
            self._guard.close_session(process.pid)

    def _on_member_state(self, name: str, state: State, detail: str) -> None:
        if self._on_state is not None:
            self._on_state(name, state, detail)

    def _on_failure(self, failure: Failure) -> None:
        if self.failure is None and self._stop_reason is None:
            self.failure = failure
            log.error("supervisor.failed", process=failure.name, reason=failure.reason, exit_status=failure.exit_status.value)
        self.request_stop(f"{failure.name}: {failure.reason}")

    def _child_env(self) -> dict[str, str]:
        env = dict(os.environ)
        if self._run_directory is not None:
            env[RUN_DIRECTORY_VARIABLE] = str(self._run_directory.absolute())
        return env

    def _exit_status(self, *, is_all_gone: bool) -> int:
        if self.failure is not None:
            status = self.failure.exit_status
        elif self._is_interrupted:
            status = ExitStatus.INTERRUPTED
        elif is_all_gone and all(member.is_clean for member in self._members.values()):
            status = ExitStatus.CLEAN
        else:
            status = ExitStatus.STOP_UNCLEAN
        log.info("supervisor.stopped", exit_status=status.value, reason=self._stop_reason)
        return status.value


def _failure_text(failure: Failure) -> str:
    """The last words on stderr. For a wrong setting, the child's own error line stands last and alone."""
    lines = [line for line in failure.stderr_lines if line.strip()]
    if failure.exit_status is ExitStatus.CLEAN:
        return ""
    if failure.exit_status is ExitStatus.CONFIG_ERROR and lines:
        return f"{lines[-1]}\n"
    head = f"headrace: {failure.name}: {failure.reason}"
    if not lines:
        return f"{head}; it wrote nothing to stderr\n"
    return "\n".join([f"headrace: last stderr lines of {failure.name}:", *(f"  {line}" for line in lines), head]) + "\n"
