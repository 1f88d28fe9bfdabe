"""Files and directories that nobody but this process's user may read, whatever the umask. Pure but for the files."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

MEMORY = ":memory:"
"""In place of a database's path: it is kept in this process, and ends with it."""


def make_private_directory(path: Path) -> None:
    """Make a directory of our own, or take one that is there from others' sight.

    Raises:
        OSError: It cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _close_to_others(path)


def open_database(path: str) -> sqlite3.Connection:
    """An SQLite database with a write-ahead log, opened on whatever thread makes it and used on the one thread that runs it.

    Args:
        path: A file's, or `MEMORY`.

    Raises:
        OSError: The file cannot be made.
        sqlite3.Error: It cannot be opened, or is no database.
    """
    if path != MEMORY:
        # SQLite makes the log and its index with the mode of the file that they belong to.
        Path(path).touch(mode=0o600)
        for suffix in ("", "-wal", "-shm"):
            _close_to_others(Path(path + suffix))
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _close_to_others(path: Path) -> None:
    # What is not there, is another's, or lies where files have no modes stays as it is.
    with suppress(OSError):
        mode = path.stat().st_mode
        if mode & 0o077:
            path.chmod(mode & 0o700)
