"""One timer of the event loop, for the earliest of many deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class DeadlineTimer:
    """One timer, for the earliest deadline."""

    def __init__(self, on_time: Callable[[], None]) -> None:
        self._on_time = on_time
        self._handle: asyncio.TimerHandle | None = None
        self._deadline_ns: int | None = None

    def set(self, deadline_ns: int | None) -> None:
        """Wait for this deadline, monotonic, instead of whatever was waited for; None: for nothing."""
        if deadline_ns == self._deadline_ns:
            return
        self._deadline_ns = deadline_ns
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if deadline_ns is not None:
            delay_s = max(0, deadline_ns - time.monotonic_ns()) / 1e9
            self._handle = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        # The loop's clock may be a little ahead of ours; then the same deadline is set again.
        self._handle = self._deadline_ns = None
        self._on_time()
