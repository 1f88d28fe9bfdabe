"""Standard output and error of a process that is not there for its lines: one that nobody can take is lost, and nothing else.

A pipe whose reader has ended, a terminal that was closed and a full disk refuse what is written. To a program that prints a result
this is an error; to a server it is none. Below the text streams lies a file that takes everything, so that whoever prints or
logs, libraries included, need not know.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

Take = Callable[[bytes], object]
"""Writes what it is given, or loses it; never raises."""


def write_or_lose(fd: int, data: bytes) -> None:
    """Write all of it, unless it is refused; waits for whoever reads there slowly."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        return


def lose_unheard_lines(take_stderr: Take | None = None) -> None:
    """From now on `sys.stdout` and `sys.stderr` never raise, whatever becomes of what they lead to.

    Args:
        take_stderr: Takes what would go to descriptor 2, for a process that must not even wait for its reader.
    """
    sys.stdout = _stream(sys.stdout, 1, None)
    sys.stderr = _stream(sys.stderr, 2, take_stderr)


class _Unheard(io.RawIOBase):
    """What lies below a text stream: gives all that it gets to `take`."""

    def __init__(self, fd: int, take: Take) -> None:
        self._fd = fd
        self._take = take

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: Any) -> int:
        self._take(bytes(data))
        return len(data)


def _stream(inherited: Any, fd: int, take: Take | None) -> io.TextIOWrapper:
    if inherited is None:
        # It was closed at the start, and its number may be something else's by now.
        return open(os.devnull, "w", encoding="utf-8")
    raw = _Unheard(fd, take or partial(write_or_lose, fd))
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)
