"""Signals of the supervisor: only noted where they strike, acted on in the event loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalRecorder:
    """Keeps the stop signals that came and have not been taken yet."""

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self._recorded: list[signal.Signals] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record signals within this block, which must run in the main thread's event loop."""
        loop = asyncio.get_running_loop()
        # SIGHUP that was set to be ignored (nohup) stays ignored. SIGINT does not: shells ignore it for every background job,
        # and a server there is stopped by it all the same.
        taken = [signum for signum in STOP_SIGNALS if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN]
        for signum in taken:
            loop.add_signal_handler(signum, self._record, signum)
        try:
            yield
        finally:
            for signum in taken:
                loop.remove_signal_handler(signum)

    def take(self) -> list[signal.Signals]:
        """The signals since the last call, oldest first."""
        taken, self._recorded = self._recorded, []
        return taken

    def _record(self, signum: signal.Signals) -> None:
        self._recorded.append(signum)
        self._on_signal()
