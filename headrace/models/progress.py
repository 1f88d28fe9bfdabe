"""How far a pull has come, shown to a person: a bar on a terminal, a line each tenth where output is a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

_NUM_LINES: Final = 10
_MEGABYTE: Final = 1_000_000


class Stage(Protocol):
    """One stage of known size, under way."""

    def advance_to(self, done_bytes: int) -> None:
        """Say how many bytes of the stage are done."""


class PullProgress(Protocol):
    """Where a pull reports to."""

    def note(self, text: str) -> None:
        """Show one line."""

    def stage(self, what: str, total_bytes: int) -> AbstractContextManager[Stage]:
        """Open a stage, for a `with` statement."""


class SilentProgress:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Drop the line."""

    @contextmanager
    def stage(self, what: str, total_bytes: int) -> Iterator[Stage]:
        """Open a stage that nobody sees."""
        yield _SilentStage()


class ConsoleProgress:
    """Writes to a console, normally stderr's.

    Args:
        console: Where to; whether it is a terminal decides between a bar and lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(stderr=True)

    def note(self, text: str) -> None:
        """Print the line as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, what: str, total_bytes: int) -> Iterator[Stage]:
        """Draw a bar, or print lines, until the `with` block ends."""
        if not self._console.is_terminal:
            yield _LineStage(self, what, total_bytes)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=self._console) as bars:
            yield _BarStage(bars, what, total_bytes)


class _SilentStage:
    def advance_to(self, done_bytes: int) -> None:
        """Nobody looks."""


class _BarStage:
    def __init__(self, bars: Progress, what: str, total_bytes: int) -> None:
        self._bars = bars
        self._task = bars.add_task(what, total=total_bytes)

    def advance_to(self, done_bytes: int) -> None:
        self._bars.update(self._task, completed=done_bytes)


class _LineStage:
    def __init__(self, progress: ConsoleProgress, what: str, total_bytes: int) -> None:
        self._progress = progress
        self._what = what
        self._total_bytes = total_bytes
        self._num_shown = 0

    def advance_to(self, done_bytes: int) -> None:
        num_reached = min(_NUM_LINES, done_bytes * _NUM_LINES // max(1, self._total_bytes))
        if num_reached <= self._num_shown:
            return
        self._num_shown = num_reached
        done, total = done_bytes / _MEGABYTE, self._total_bytes / _MEGABYTE
        self._progress.note(f"{self._what}: {num_reached * 100 // _NUM_LINES} % ({done:.1f} of {total:.1f} MB)")
