"""Which responses are being made, by this router or another that shares its history. Pure but for the files.

Whoever makes a response holds the lock of a file of that name. Death lets go of it, so what nobody holds nobody makes.
"""

from __future__ import annotations

import os
from pathlib import Path

from services.router.file_lock import take_lock

_ABANDONED_S = 86400


class Claims:
    """Locked files in a directory, or in memory where nobody shares."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        # Where there are files, with their handles.
        self._held: dict[str, int | None] = {}

    def take(self, name: str) -> None:
        """This router begins something that nobody else can know of yet."""
        handle = None
        if self._directory is not None:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            handle = take_lock(self._directory / name)
        self._held[name] = handle

    def release(self, name: str) -> None:
        """It is over; idempotent."""
        handle = self._held.pop(name, None)
        if handle is not None and self._directory is not None:
            (self._directory / name).unlink(missing_ok=True)
            os.close(handle)

    def is_taken(self, name: str) -> bool:
        """Whether anybody is at it."""
        if name in self._held:
            return True
        if self._directory is None or not (path := self._directory / name).exists():
            return False
        handle = take_lock(path)
        if handle is None:
            return True
        # Its holder died.
        path.unlink(missing_ok=True)
        os.close(handle)
        return False

    def sweep(self, now_s: float) -> None:
        """Drop files of the dead that nobody has asked about for a day."""
        if self._directory is not None and self._directory.exists():
            for path in list(self._directory.iterdir()):
                if path.stat().st_mtime < now_s - _ABANDONED_S:
                    self.is_taken(path.name)

    def close(self) -> None:
        """Let go of all."""
        for name in list(self._held):
            self.release(name)
