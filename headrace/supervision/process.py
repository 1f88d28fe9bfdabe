"""One supervised process: spawned into its own session, watched by pidfd, stopped in steps, proven gone by /proc.

Owns the child's pidfd, the read end of its stderr and our end of its notification channel. It knows nothing of restarts,
order or deadlines to be started: headrace/supervision/member.py decides those and is called back on every change.

stdout is inherited and stderr is read by the event loop. There is never a wait for a pipe to close: a grandchild that holds
it would delay the news of the child's death for as long as it lives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Literal

import structlog

from headrace.supervision.child import LIFELINE_VARIABLE, NOTIFY_VARIABLE, STANDBY_VARIABLE, SUPERVISOR_PID_VARIABLE
from headrace.supervision.exit_status import describe_exit
from headrace.supervision.limits import ProcessSpec
from headrace.supervision.notification import Notification
from headrace.supervision.notify_channel import NotifyChannel, OnChange
from headrace.supervision.process_table import (
    MARK_VARIABLE,
    ProcessEntry,
    descendants,
    kill_entry,
    read_entry,
    read_marks,
    read_table,
)
from headrace.supervision.stderr_relay import StderrReader, StderrRelay

log = structlog.get_logger(__name__)

_LEFTOVER_GRACE_S = 0.3
_SWEEP_POLL_S = 0.02
_SWEEP_DEADLINE_S = 5.0
# A process between fork and the end of exec can escape one look: no mark yet, or born behind the reader's back.
_NUM_CLEAN_LOOKS = 2

_STATE_WORDS = {"R": "running", "S": "sleeping", "D": "in an uninterruptible wait", "T": "stopped by a signal", "t": "being traced"}

StopStage = Literal["drained", "terminated", "killed"]


@dataclass(frozen=True)
class SpawnContext:
    """What a supervisor lends to each process it spawns."""

    token: str
    """Random name of this supervisor's life, the first part of its children's marks."""
    lifeline_fd: int
    """Read end of the lifeline pipe."""
    relay: StderrRelay
    env: dict[str, str]
    """The whole environment, to which the spec's and the process's own variables are added."""
    stderr_tail_lines: int


class Process:
    """One life of a child process. Made by `spawn`; `close` must follow its end."""

    def __init__(
        self,
        name: str,
        popen: subprocess.Popen[bytes],
        *,
        mark: str,
        channel: NotifyChannel,
        stderr: StderrReader,
        on_change: OnChange,
        turn_fd: int | None,
    ) -> None:
        self.name = name
        self.pid = popen.pid
        self.is_killed = False
        """Whether we sent SIGKILL to it."""
        self._popen = popen
        self._mark = mark
        self._channel = channel
        self._stderr = stderr
        self._on_change = on_change
        self._turn_fd = turn_fd
        self._exited = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    def spawn(
        cls, spec: ProcessSpec, context: SpawnContext, *, life: int, on_change: OnChange, is_standby: bool = False
    ) -> Process:
        """Start `spec` as leader of a new session and process group.

        Args:
            spec: What to start.
            context: What the supervisor lends.
            life: Number of this life of the process, from 1.
            on_change: Called in the event loop after an exit or a notification.
            is_standby: Whether it is to wait until `give_turn`.

        Raises:
            OSError: The program cannot be started.
        """
        # The parent death signal that the child asks for is bound to the thread that spawned it.
        assert threading.current_thread() is threading.main_thread(), "processes must be spawned from the main thread"
        mark = f"{context.token}:{spec.name}.{life}"
        outer = context.env.get(MARK_VARIABLE)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The end of this pipe is the word that its turn has come: heard by all who hold it, and never lost.
        waiting_fd, turn_fd = os.pipe2(os.O_CLOEXEC) if is_standby else (None, None)
        try:
            with theirs:
                own_variables = {
                    LIFELINE_VARIABLE: str(context.lifeline_fd),
                    NOTIFY_VARIABLE: str(theirs.fileno()),
                    SUPERVISOR_PID_VARIABLE: str(os.getpid()),
                    MARK_VARIABLE: f"{outer}/{mark}" if outer else mark,
                }
                own_fds = [context.lifeline_fd, theirs.fileno()]
                if waiting_fd is not None:
                    own_variables[STANDBY_VARIABLE] = str(waiting_fd)
                    own_fds.append(waiting_fd)
                popen = subprocess.Popen(
                    list(spec.argv),
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    env={**context.env, **spec.env, **own_variables},
                    pass_fds=(*own_fds, *spec.pass_fds),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            if turn_fd is not None:
                os.close(turn_fd)
            raise
        finally:
            if waiting_fd is not None:
                os.close(waiting_fd)
        assert popen.stderr is not None
        stderr = StderrReader(popen.stderr, relay=context.relay, num_lines_max=context.stderr_tail_lines)
        channel = NotifyChannel(ours, name=spec.name, on_change=on_change)
        process = cls(spec.name, popen, mark=mark, channel=channel, stderr=stderr, on_change=on_change, turn_fd=turn_fd)
        log.info("process.spawned", process=spec.name, process_pid=popen.pid, life=life, is_standby=is_standby)
        return process

    @property
    def returncode(self) -> int | None:
        """None while it runs; else its exit status, or minus the signal that killed it."""
        return self._popen.returncode

    @property
    def exit_reason(self) -> str:
        """How it ended: "exit status 3", "killed by SIGKILL"; "running" while it does."""
        return "running" if self.returncode is None else describe_exit(self.returncode)

    @property
    def stderr_lines(self) -> list[str]:
        """The last lines of its stderr, oldest first."""
        return self._stderr.lines

    def give_turn(self) -> None:
        """Let a standby go on."""
        if self._turn_fd is not None:
            log.info("process.turn_given", process=self.name, process_pid=self.pid)
            os.close(self._turn_fd)
            self._turn_fd = None

    def take_notifications(self) -> list[Notification]:
        """What the child has said since the last call, including what still waits in the socket."""
        return self._channel.take()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the exit of the process itself; False when `timeout_s` passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return False
        return True

    def signal(self, signum: signal.Signals, *, reason: str, to_group: bool = False) -> None:
        """Signal the process alone or its whole group."""
        if signum is signal.SIGKILL:
            self.is_killed = True
        event = "process.killed" if signum is signal.SIGKILL else "process.signalled"
        log.info(event, process=self.name, process_pid=self.pid, signal=signum.name, to_group=to_group, reason=reason)
        if not to_group:
            if self._popen.returncode is None:
                self._popen.send_signal(signum)
            return
        try:
            # Until the sweep is done the group id cannot belong to strangers: it is checked to have members of ours.
            if self._popen.returncode is None or self.members():
                os.killpg(self.pid, signum)
        except ProcessLookupError:
            log.debug("process.group_empty", process=self.name, process_pid=self.pid)

    async def stop(self, *, drain_deadline_s: float, term_deadline_s: float, reason: str) -> StopStage:
        """End the process and everything it started, as gently as its deadlines allow.

        SIGTERM to the process alone (drain) → SIGTERM to the group → SIGKILL to the group → whatever is left, by pidfd.

        Returns:
            The step at which the process itself ended.
        """
        stage: StopStage = "drained"
        if self.returncode is None:
            self.signal(signal.SIGTERM, reason=reason)
        if not await self.wait(drain_deadline_s):
            stage = "terminated"
            self.signal(signal.SIGTERM, reason=f"not drained within {drain_deadline_s:g} s", to_group=True)
            # A stopped process would not see the signal.
            self.signal(signal.SIGCONT, reason="deliver SIGTERM", to_group=True)
            if not await self.wait(term_deadline_s):
                self.signal(signal.SIGKILL, reason=f"not ended within {term_deadline_s:g} s of SIGTERM", to_group=True)
                await self.wait(_SWEEP_DEADLINE_S)
        await self.sweep(grace_s=_LEFTOVER_GRACE_S if self.returncode == 0 else 0.0)
        return "killed" if self.is_killed else stage

    async def sweep(self, *, grace_s: float = 0.0) -> bool:
        """Kill whatever this process started and left behind, seen in /proc; the process itself has ended.

        Args:
            grace_s: Time for helpers that end by themselves when the process does.

        Returns:
            True when nothing is left.
        """
        begin = time.monotonic()
        num_clean_looks = 0
        while num_clean_looks < _NUM_CLEAN_LOOKS:
            members = self.members()
            num_clean_looks = 0 if members else num_clean_looks + 1
            elapsed_s = time.monotonic() - begin
            if members and elapsed_s > _SWEEP_DEADLINE_S:
                log.error("process.left_behind", process=self.name, left=[repr(entry) for entry in members], is_killed=False)
                return False
            if elapsed_s >= grace_s:
                for entry in members:
                    if kill_entry(entry):
                        log.warning("process.left_behind", process=self.name, left=[repr(entry)], is_killed=True)
            await asyncio.sleep(_SWEEP_POLL_S)
        return True

    def members(self) -> list[ProcessEntry]:
        """Live processes of this life: its group, its session, its mark, and all that descends from those.

        All of them descend from the supervisor, to which the kernel hands orphans; no one else is looked at.
        """
        table = read_table()
        ours = descendants(table, {os.getpid()})
        grouped = {pid for pid in ours if self.pid in (pid, table[pid].pgid, table[pid].session_id)}
        members = grouped | {pid for pid in ours - grouped if self._mark in read_marks(pid)}
        members |= descendants(table, members)
        return [table[pid] for pid in sorted(members) if table[pid].is_alive]

    def describe_state(self) -> str:
        """The kernel's word for what it is doing, for the reason of a stall."""
        entry = read_entry(self.pid)
        return _STATE_WORDS.get(entry.state, f"state {entry.state}") if entry is not None else "gone"

    def close(self) -> None:
        """Let go of the descriptors, and take the exit status if that has not happened."""
        self._popen.poll()
        self._stderr.close()
        self._channel.close()
        if self._turn_fd is not None:
            os.close(self._turn_fd)
            self._turn_fd = None
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        if self._popen.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        self._stderr.read_rest()
        log.info("process.exited", process=self.name, process_pid=self.pid, reason=self.exit_reason, returncode=self.returncode)
        self._exited.set()
        self._on_change()
