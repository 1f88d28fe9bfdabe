"""The run directory: where a tree keeps its ipc sockets. One live supervisor owns it; what a dead one left is cleared away.

Ownership is a lock on the directory itself, which the kernel drops with its holder: no race between two starts, no pid that
means someone else by now. The pid file is there to name the owner, and to tell a directory of ours from any other: a
directory that holds files but no pid file is never touched. Used by the supervisor and, after its death, by the guard.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from types import TracebackType

from headrace.errors import ConfigError
from headrace.supervision.process_table import read_entry

PID_FILE_NAME = "supervisor.pid"
_PARAM = "run_directory"
_PATIENCE_S = 3.0
_POLL_S = 0.02


class RunDirectory:
    """A run directory held by this process; a context manager that removes it at the end."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def claim(cls, path: Path) -> RunDirectory:
        """Take `path` for this process, made anew or cleared of what a dead supervisor left.

        Raises:
            ConfigError: Another supervisor lives there, or it is not a directory that may be cleared.
        """
        path = path.absolute()
        patient_until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise ConfigError(f"run directory {path} cannot be used: {error.strerror}", param=_PARAM) from error
            try:
                if _lock(path, lock_fd, is_patient=time.monotonic() < patient_until):
                    _clear(path, lock_fd)
                    _sign(path)
                    return cls(path, lock_fd)
            except OSError as error:
                # No permission, or a disk that is full.
                os.close(lock_fd)
                raise ConfigError(f"run directory {path} cannot be used: {error.strerror}", param=_PARAM) from error
            except BaseException:
                os.close(lock_fd)
                raise
            os.close(lock_fd)
            time.sleep(_POLL_S)

    def remove(self) -> None:
        """Remove the directory and all in it, then let go of it. A second call does nothing."""
        if self._lock_fd < 0:
            return
        # Under the lock: a successor either waits its turn or finds the path gone and makes it anew.
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def remove_run_directory_of(path: str, supervisor_pid: int) -> None:
    """Remove the run directory that the dead process `supervisor_pid` left, unless another supervisor has taken it over."""
    try:
        lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _owner_pid(Path(path)) == supervisor_pid:
            shutil.rmtree(path, ignore_errors=True)
        elif not os.listdir(lock_fd):
            # It died between making the directory and signing it.
            os.rmdir(path)
    except OSError:
        # A successor holds it, or has just removed it: then it is not ours to remove.
        return
    finally:
        os.close(lock_fd)


def _lock(path: Path, lock_fd: int, *, is_patient: bool) -> bool:
    """Lock the open directory; False to try again: it was removed meanwhile, or a dead supervisor's guard is at it."""
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner_pid(path)
        if is_patient and (owner is None or read_entry(owner) is None):
            return False
        named = f"process {owner}" if owner is not None else "another process"
        raise ConfigError(
            f"run directory {path} is in use by a live supervisor ({named}): stop that one, or choose another run directory",
            param=_PARAM,
        ) from None
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(lock_fd))
    except FileNotFoundError:
        return False


def _clear(path: Path, lock_fd: int) -> None:
    """Empty a directory of ours and close it to others."""
    if os.fstat(lock_fd).st_uid != os.geteuid():
        raise ConfigError(f"run directory {path} belongs to another user", param=_PARAM)
    names = os.listdir(path)
    if names and PID_FILE_NAME not in names:
        raise ConfigError(
            f"run directory {path} is not empty and no supervisor made it; it would be emptied, so choose another or empty it",
            param=_PARAM,
        )
    os.fchmod(lock_fd, 0o700)
    # The pid file goes last: a half-cleared directory is still known as ours.
    for name in sorted(names, key=lambda name: name == PID_FILE_NAME):
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sign(path: Path) -> None:
    entry = read_entry(os.getpid())
    assert entry is not None
    (path / PID_FILE_NAME).write_text(f"{entry.pid} {entry.start_ticks}\n")


def _owner_pid(path: Path) -> int | None:
    try:
        return int((path / PID_FILE_NAME).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
