"""The supervisor's side of its guard: start it, tell it the children's sessions, replace it when it dies, send it home."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import structlog

from headrace.supervision.process_table import MARK_VARIABLE

log = structlog.get_logger(__name__)

_READY_TIMEOUT_S = 20.0
_RESPAWN_DELAY_S = 0.5
_END_TIMEOUT_S = 2.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# Isolated and without site: no user setting, no .pth file and no other package takes part or costs time.
_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); from headrace.supervision.guard import main; main(sys.argv[1:])"


class GuardHandle:
    """Keeps one guard process alive beside this supervisor."""

    def __init__(self, *, token: str, run_directory: Path | None) -> None:
        self._token = token
        self._run_directory = run_directory
        self._sessions: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The guard's pid, or None when there is none now."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start a guard and wait until it stands; only then may children be spawned."""
        self._spawn()
        assert self._channel is not None
        async with asyncio.timeout(_READY_TIMEOUT_S):
            if not await asyncio.get_running_loop().sock_recv(self._channel, 1):
                raise RuntimeError("the guard ended before it stood")
        self._send("".join(f"+{session}\n" for session in sorted(self._sessions)))

    async def keep_standing(self) -> None:
        """Replace the guard whenever it dies; runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if self._channel is not None:
                # The guard never speaks again, so the read ends only when the guard does.
                with contextlib.suppress(ConnectionError):
                    await loop.sock_recv(self._channel, 1)
            returncode = await asyncio.to_thread(self._discard)
            log.warning("guard.lost", returncode=returncode, respawn_delay_s=_RESPAWN_DELAY_S)
            await asyncio.sleep(_RESPAWN_DELAY_S)
            try:
                await self.start()
            except (OSError, RuntimeError, TimeoutError) as error:
                log.error("guard.start_failed", error=str(error))
                await asyncio.to_thread(self._discard)

    def open_session(self, session_id: int) -> None:
        """A child leads this new session."""
        self._sessions.add(session_id)
        self._send(f"+{session_id}\n")

    def close_session(self, session_id: int) -> None:
        """Nothing of this session is left."""
        self._sessions.discard(session_id)
        self._send(f"-{session_id}\n")

    def dismiss(self) -> None:
        """Send the guard home; the tree has ended in order."""
        self._send("quit\n")
        self._discard()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", _PROGRAM, _PACKAGE_ROOT, str(theirs.fileno()), str(os.getpid()), self._token]
            self._process = subprocess.Popen(
                [*argv, str(self._run_directory or "")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                env={name: os.environ[name] for name in (MARK_VARIABLE, "PATH", "LD_LIBRARY_PATH") if name in os.environ},
            )
        ours.setblocking(False)
        self._channel = ours

    def _send(self, text: str) -> None:
        if self._channel is None or not text:
            return
        try:
            self._channel.sendall(text.encode())
        except OSError as error:
            # A dead guard is noticed and replaced by `keep_standing`, which tells the new one everything.
            log.debug("guard.unreachable", error=str(error))

    def _discard(self) -> int | None:
        """Close the channel and make sure that the process is gone; its exit status."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            return process.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
