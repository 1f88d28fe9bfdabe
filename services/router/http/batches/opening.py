"""The storage of files and batches, opened when it is first needed, on its own thread. Part of the shell.

So a router whose clients leave nothing here needs no directory that it can write to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from services.router.http.batches.storage import DATABASE, FileLimits, Storage
from services.router.storage_thread import StorageThread

_Result = TypeVar("_Result")


class OpeningStorage:
    """Runs functions of a `Storage`."""

    def __init__(self, directory: Path, limits: FileLimits) -> None:
        self.directory = directory
        self._limits = limits
        self._thread = StorageThread("the storage of files and batches")
        self._storage: Storage | None = None

    @property
    def is_there(self) -> bool:
        """Whether a former life or this one has made it."""
        return self._storage is not None or (self.directory / DATABASE).exists()

    async def run(self, function: Callable[[Storage], _Result]) -> _Result:
        """What a blocking function makes of the storage.

        Raises:
            RequestFailedError: The directory cannot be used.
        """
        return await self._thread.run(self._call, function)

    def _call(self, function: Callable[[Storage], _Result]) -> _Result:
        if self._storage is None:
            self._storage = Storage(self.directory, self._limits)
        return function(self._storage)

    def close(self) -> None:
        """Let what waits end, and close the database."""
        self._thread.close()
        if self._storage is not None:
            self._storage.close()
