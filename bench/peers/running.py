"""Servers as running processes: started in sessions of their own, waited for, and stopped to the last process.

Each dies with this process, however it ends (by `setpriv --pdeathsig`, where that program is there), and an orderly stop looks in
/proc for what is left.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.peers import proc
from bench.peers.servers import ServerSpec
from bench.peers.steps import tail
from headrace.supervision.process_table import ProcessEntry, kill_entry, read_entry

_STOP_S = 20.0
_POLL_S = 0.1
_KILLED_POLL_S = 0.02
_PROBE_S = 2.0
_GIB = 1 << 30


class ServerError(RuntimeError):
    """A server did not become ready, or there is no memory for it."""


class RunningServer:
    """One server, from its start to its stop."""

    def __init__(self, spec: ServerSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self._begin_s = time.monotonic()
        guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*guard, *spec.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.env},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The root of its process tree."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether its root process runs."""
        return self._process.poll() is None

    def wait_ready(self) -> float:
        """Wait until it answers; seconds since its start.

        Raises:
            ServerError: It ended, or took longer than its limit.
        """
        deadline_s = self._begin_s + self.spec.start_limit_s
        while time.monotonic() < deadline_s:
            if not self.is_alive:
                raise ServerError(f"{self.spec.name} ended with status {self._process.returncode}; {self._log_end()}")
            if _answers(self.spec.base_url + self.spec.ready_path):
                return time.monotonic() - self._begin_s
            time.sleep(_POLL_S)
        raise ServerError(f"{self.spec.name} was not ready within {self.spec.start_limit_s:.0f} s; {self._log_end()}")

    def stop(self) -> None:
        """Ask it to end, then end whatever of its processes is left, and see it gone.

        Raises:
            ServerError: Something of it cannot be ended.
        """
        entries = proc.tree(self.pid)
        if self.is_alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait(timeout=_STOP_S)
        left = [entry for entry in entries if entry.pid != self.pid]
        deadline_s = time.monotonic() + _STOP_S
        while left and time.monotonic() < deadline_s:
            for entry in left:
                kill_entry(entry)
            time.sleep(_KILLED_POLL_S)
            left = [entry for entry in left if _lives(entry)]
        if left:
            raise ServerError(f"{self.spec.name}: these processes of it cannot be ended: {left}")

    def _log_end(self) -> str:
        return f"its log, {self.log_path}, ends:\n{tail(self.log_path)}"


@contextmanager
def running(
    specs: Sequence[ServerSpec], *, logs: Path, say: Callable[[str], None]
) -> Iterator[dict[str, tuple[RunningServer, float]]]:
    """Start the servers one after the other and stop them at the end: by name, with how long each took to be ready, seconds.

    Raises:
        ServerError: One cannot be started; those before it have been stopped.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        found = {}
        for spec in specs:
            _check_memory(spec)
            say(f"{spec.name}: starting ({spec.about})")
            server = RunningServer(spec, logs / f"server-{spec.name}.log")
            stack.callback(server.stop)
            ready_s = server.wait_ready()
            say(f"{spec.name}: ready after {ready_s:.1f} s")
            found[spec.name] = (server, ready_s)
        yield found


def _lives(entry: ProcessEntry) -> bool:
    """Whether the very process of the entry is still there, and more than an exit status."""
    now = read_entry(entry.pid)
    return now is not None and now.start_ticks == entry.start_ticks and now.is_alive


def _check_memory(spec: ServerSpec) -> None:
    available_bytes = proc.available_bytes()
    if available_bytes < spec.needs_bytes:
        raise ServerError(
            f"{spec.name} needs {spec.needs_bytes / _GIB:.0f} GiB of memory, and {available_bytes / _GIB:.1f} GiB are left beside "
            "the servers already up: leave a peer out (--peers)"
        )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_S):
            return True
    except (urllib.error.URLError, OSError):
        return False
