"""Event loops whose time passes only while nothing else is to be done, so that no load on the machine makes a timeout pass.

For tests that wait for nothing outside the event loop: no thread, no process, no other end of a socket.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class _ImpatientSelector(selectors.DefaultSelector):
    """Where the loop would wait for its next timer, it is that time."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout is not None and timeout > 0:
            self.now_s += timeout
        return ready


class _VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _ImpatientSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a synchronous test of an asynchronous one, which runs on a loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        with asyncio.Runner(loop_factory=_VirtualTimeLoop) as runner:
            runner.run(test())

    return run
