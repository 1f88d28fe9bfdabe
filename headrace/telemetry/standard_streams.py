"""Standard output and error of a process that is not there for its lines: one that nobody can take is lost, and nothing else.

A pipe whose reader has ended, a terminal that was closed and a full disk refuse what is written. To a program that prints a result
this is an error; to a server it is none. Below the text streams lies a file that takes everything, so that whoever prints or
logs, libraries included, need not know.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Unheard(io.FileIO):
    """A file to write to that drops what it cannot take."""

    def write(self, data: Any) -> int:
        """Write what can be written; the rest of it counts as written too when it is refused."""
        try:
            num_bytes = super().write(data)
        except OSError:
            num_bytes = None
        # None: the other end does not take it now, and has asked not to be waited for.
        return len(data) if num_bytes is None else num_bytes


def lose_unheard_lines() -> None:
    """From now on `sys.stdout` and `sys.stderr` never raise, whatever becomes of what they lead to."""
    sys.stdout = _stream(sys.stdout, 1)
    sys.stderr = _stream(sys.stderr, 2)


def _stream(inherited: Any, fd: int) -> io.TextIOWrapper:
    # Where it was closed at the start there is none, and its number may be something else's by now.
    file = _Unheard(fd, "w", closefd=False) if inherited is not None else _Unheard(os.devnull, "w")
    return io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", errors="backslashreplace", line_buffering=True)
