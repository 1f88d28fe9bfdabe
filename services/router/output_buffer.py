"""What a client has not read yet of its output: merged while it is busy, bounded, and timed. Pure.

The reader takes everything at once; while it is away, sending, new pieces run together, so a slow socket costs one chunk a turn
and never a queue of them.
"""

from __future__ import annotations

from headrace.errors import HeadraceError, RequestAbortedError
from services.router.generation import OutputPiece


class OutputBuffer:
    """Output between a request and the one who reads it."""

    def __init__(self, limit_chars: int) -> None:
        self._limit_chars = limit_chars
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._num_chars = 0
        self._finish_reason: str | None = None
        self._error: HeadraceError | None = None
        self._has_new = False
        self._busy_since_ns: int | None = None

    @property
    def is_ready(self) -> bool:
        """Whether `take` has something to give or to raise."""
        return self._has_new or self._error is not None

    @property
    def is_over_limit(self) -> bool:
        """Whether more is unread than may be kept."""
        return self._num_chars > self._limit_chars

    def is_reader_stuck(self, now_ns: int, timeout_ns: int) -> bool:
        """Whether the reader took something long ago and has not come back since."""
        return self._busy_since_ns is not None and now_ns - self._busy_since_ns >= timeout_ns

    def put(self, text: str, token_ids: tuple[int, ...], finish_reason: str | None) -> None:
        """Add new output."""
        if text:
            self._texts.append(text)
            self._num_chars += len(text)
        self._token_ids.extend(token_ids)
        self._finish_reason = finish_reason
        self._has_new = True

    def fail(self, error: HeadraceError) -> None:
        """The request ended without its full output; what came before is still given."""
        self._error = error

    def come_back(self) -> None:
        """The reader is here again."""
        self._busy_since_ns = None

    def take(self, now_ns: int) -> OutputPiece:
        """Everything new, as one piece; the error after the last of it.

        Raises:
            HeadraceError: The request ended without its full output.
        """
        if not self._has_new:
            raise self._error if self._error is not None else RequestAbortedError("the output was read to its end")
        piece = OutputPiece("".join(self._texts), tuple(self._token_ids), self._finish_reason)
        self._texts.clear()
        self._token_ids.clear()
        self._num_chars = 0
        self._has_new = False
        self._busy_since_ns = now_ns
        return piece
