"""Runs what blocks, such as SQLite and files, on a thread of its own: the event loop never waits for a disk. Part of the shell.

Calls run one after the other, in the order in which they came; there is a limit to how many may wait.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from headrace.errors import OverloadedError, RequestFailedError
from headrace.telemetry import logs

log = logs.get_logger()

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class StorageThread:
    """One thread, and the calls that wait for it."""

    def __init__(self, name: str, *, max_waiting: int = 4096) -> None:
        self._name = name
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        """What a blocking call gives. Once begun it ends, whether or not somebody still waits for it.

        Raises:
            OverloadedError: Too many calls wait.
            RequestFailedError: The disk, the file or the database fails: full, gone, locked or broken.
        """
        if self._num_waiting >= self._max_waiting:
            raise OverloadedError(f"router: {self._num_waiting} calls wait for {self._name}, the limit; retry later")
        self._num_waiting += 1
        future = self._executor.submit(function, *args, **kwargs)
        future.add_done_callback(self._on_done(asyncio.get_running_loop()))
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except (sqlite3.Error, OSError) as error:
            log.exception("storage.failed", storage=self._name)
            raise RequestFailedError(f"router: {self._name} cannot be used ({error})") from error

    def _on_done(self, loop: asyncio.AbstractEventLoop) -> Callable[[object], None]:
        def count() -> None:
            self._num_waiting -= 1

        def done(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(count)

        return done

    def close(self) -> None:
        """Let what waits end, and end the thread."""
        self._executor.shutdown(wait=True)
