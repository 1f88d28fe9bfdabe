"""What runs inside a supervised process at its start: `attach()` ties its life to its supervisor's and opens the way to tell it.

Three ties, because each misses a case the others catch:
- PR_SET_PDEATHSIG (SIGKILL): the kernel acts at once, even on a process parked in a driver call with the interpreter lock
  held. But it is bound to the parent's *thread*, is lost in grandchildren, and does not exist before it is set.
- The lifeline: a pipe whose only write end the supervisor holds. A thread waits for its end of file and then kills the whole
  process group. But it needs the interpreter lock, and SIGKILL by the first tie may come before it acts.
- The guard (headrace/supervision/guard.py): a process beside the supervisor, not in here, that survives both and kills
  whatever is left, grandchildren that know nothing of us included. It alone would do; it is also just one process, so that
  its own death must not be fatal.

Outside a supervisor `attach()` changes nothing, and notifications go nowhere.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import threading
from collections.abc import Mapping

from headrace.lifecycle import State
from headrace.supervision.exit_status import ExitStatus
from headrace.supervision.notification import Notification, encode_notification
from headrace.supervision.process_table import MARK_VARIABLE

LIFELINE_VARIABLE = "HEADRACE_LIFELINE_FD"
NOTIFY_VARIABLE = "HEADRACE_NOTIFY_FD"
SUPERVISOR_PID_VARIABLE = "HEADRACE_SUPERVISOR_PID"
STANDBY_VARIABLE = "HEADRACE_STANDBY_FD"
RUN_DIRECTORY_VARIABLE = "HEADRACE_RUN_DIRECTORY"

SUPERVISION_VARIABLES = frozenset(
    {LIFELINE_VARIABLE, NOTIFY_VARIABLE, SUPERVISOR_PID_VARIABLE, STANDBY_VARIABLE, RUN_DIRECTORY_VARIABLE, MARK_VARIABLE}
)
"""Every variable a supervisor sets; the config loader must not call them unknown."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Notifier:
    """Sends states and progress to the supervisor. Never blocks, never raises for a slow or dead supervisor.

    A state that does not fit into the full socket is kept and sent before the next message; progress is simply dropped,
    as the next report says more. Safe to use from any thread.
    """

    def __init__(self, channel: socket.socket | None) -> None:
        self._channel = channel
        self._unsent_state: bytes | None = None
        self._lock = threading.Lock()
        self.num_dropped = 0
        """Progress reports lost to a full socket."""

    def state(self, state: State, detail: str = "") -> None:
        """Tell the state this process is in now; `detail` is one line for people."""
        if self._channel is None:
            return
        data = encode_notification(Notification(state=state, detail=detail))
        with self._lock:
            self._unsent_state = None if self._send(data) else data

    def progress(self, counters: Mapping[str, float], *, is_busy: bool = False) -> None:
        """Report counters that change as work gets done, and whether there is work.

        After the first report silence counts as a stall, so keep reporting; and send the first one before `started`, or a
        hang between the two goes unnoticed.
        """
        if self._channel is None:
            return
        data = encode_notification(Notification(progress=counters, is_busy=is_busy))
        with self._lock:
            if self._unsent_state is not None and self._send(self._unsent_state):
                self._unsent_state = None
            # A state must not be overtaken, so while one is unsent the report is dropped.
            if self._unsent_state is not None or not self._send(data):
                self.num_dropped += 1

    def close(self) -> None:
        """Close the channel; later calls do nothing."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def _send(self, data: bytes) -> bool:
        if self._channel is None:
            return False
        try:
            self._channel.send(data)
        except OSError:
            # Full, or the supervisor is gone, which the other ties take care of; the caller counts it.
            return False
        return True


class Attachment:
    """The tie to the supervisor, as the rest of the process sees it."""

    def __init__(self, notifier: Notifier, *, is_supervised: bool, standby_fd: int | None = None) -> None:
        self.notifier = notifier
        self.is_supervised = is_supervised
        self.standby_fd = standby_fd
        """Ends when the turn of this process has come; None in one that is no standby. A group shares it."""

    def wait_turn(self) -> None:
        """In a standby, block until the life before has ended; else return at once."""
        if self.standby_fd is not None:
            while os.read(self.standby_fd, 1):
                pass
            os.close(self.standby_fd)
            self.standby_fd = None


def attach() -> Attachment:
    """Tie this process to its supervisor. Call once, first thing in `__main__`, before slow imports.

    The variables with numbers of this process alone are taken out of `os.environ`, and their descriptors are closed
    on exec, so that programs started from here are not mistaken for supervised ones. The mark and the run directory stay.
    """
    supervisor_pid = os.environ.pop(SUPERVISOR_PID_VARIABLE, None)
    lifeline = os.environ.pop(LIFELINE_VARIABLE, None)
    notify = os.environ.pop(NOTIFY_VARIABLE, None)
    standby = os.environ.pop(STANDBY_VARIABLE, None)
    if supervisor_pid is None or lifeline is None or notify is None:
        return Attachment(Notifier(None), is_supervised=False)
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(supervisor_pid):
        # The supervisor died before the kernel knew that we care.
        _end_group()
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=False)
    lifeline_fd = int(lifeline)
    os.set_inheritable(lifeline_fd, False)
    threading.Thread(target=_watch_lifeline, args=(lifeline_fd,), name="lifeline", daemon=True).start()
    channel = socket.socket(fileno=int(notify))
    channel.setblocking(False)
    channel.set_inheritable(False)
    standby_fd = int(standby) if standby is not None else None
    if standby_fd is not None:
        os.set_inheritable(standby_fd, False)
    return Attachment(Notifier(channel), is_supervised=True, standby_fd=standby_fd)


def set_parent_death_signal(signum: int) -> None:
    """Have the kernel send `signum` to this process when the thread that spawned it ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def set_child_subreaper() -> None:
    """Make this process the new parent of its orphaned descendants, so that none can slip away to pid 1."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(number) for number in (value, 0, 0, 0)]
    if libc.prctl(ctypes.c_int(option), *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")


def _watch_lifeline(fd: int) -> None:
    # Nobody writes to the pipe: the only thing that can be read is its end.
    while os.read(fd, 1):
        pass
    _end_group()


def _end_group() -> None:
    """Kill this process and, when it leads its group as the supervisor arranged, the group with it."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(ExitStatus.SUPERVISOR_LOST)
