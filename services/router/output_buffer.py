"""What a client has not read yet of its output: merged while it is busy, bounded, and timed. Pure.

The reader takes everything of a choice at once; while it is away, sending, new pieces run together, so a slow socket costs one
chunk a turn and never a queue of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headrace.errors import HeadraceError, RequestAbortedError
from services.router.generation import OutputPiece, TokenLogprob, ToolCallDelta

_LOGPROB_CHARS = 64
"""What a token with its logprob counts as, beside the text."""


@dataclass(slots=True)
class _Unread:
    """What has come of one choice."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reasonings: list[str] = field(default_factory=list)
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_chars: int = 0


class OutputBuffer:
    """Output between a request and the one who reads it."""

    def __init__(self, limit_chars: int) -> None:
        self._limit_chars = limit_chars
        # By choice, the one that has been unread for longest first.
        self._unread: dict[int, _Unread] = {}
        self._num_chars = 0
        self._error: HeadraceError | None = None
        self._busy_since_ns: int | None = None

    @property
    def is_ready(self) -> bool:
        """Whether `take` has something to give or to raise."""
        return bool(self._unread) or self._error is not None

    @property
    def is_over_limit(self) -> bool:
        """Whether more is unread than may be kept."""
        return self._num_chars > self._limit_chars

    def is_reader_stuck(self, now_ns: int, timeout_ns: int) -> bool:
        """Whether the reader took something long ago and has not come back since."""
        return self._busy_since_ns is not None and now_ns - self._busy_since_ns >= timeout_ns

    def put(self, piece: OutputPiece, choice: int = 0) -> None:
        """Add new output of a choice."""
        unread = self._unread.get(choice)
        if unread is None:
            unread = self._unread[choice] = _Unread()
        num_chars = len(piece.text)
        if piece.text:
            unread.texts.append(piece.text)
        if piece.reasoning:
            unread.reasonings.append(piece.reasoning)
            num_chars += len(piece.reasoning)
        if piece.tool_calls:
            unread.tool_calls.extend(piece.tool_calls)
            num_chars += sum(len(delta.name) + len(delta.arguments) for delta in piece.tool_calls)
        if piece.logprobs:
            unread.logprobs.extend(piece.logprobs)
            num_chars += _LOGPROB_CHARS * sum(1 + len(token.top) for token in piece.logprobs)
        if piece.prompt_logprobs:
            # There is one prompt a choice, of a length that the scheduler bounds: it counts for nothing here.
            unread.prompt_logprobs = piece.prompt_logprobs
        unread.num_chars += num_chars
        self._num_chars += num_chars
        unread.token_ids.extend(piece.token_ids)
        unread.finish_reason = piece.finish_reason

    def fail(self, error: HeadraceError) -> None:
        """The request ended without its full output; what came before is still given."""
        self._error = error

    def come_back(self) -> None:
        """The reader is here again."""
        self._busy_since_ns = None

    def take(self, now_ns: int) -> OutputPiece:
        """Everything new of one choice, as one piece; the error after the last of all.

        Raises:
            HeadraceError: The request ended without its full output.
        """
        if not self._unread:
            raise self._error if self._error is not None else RequestAbortedError("the output was read to its end")
        choice = next(iter(self._unread))
        unread = self._unread.pop(choice)
        self._num_chars -= unread.num_chars
        self._busy_since_ns = now_ns
        return OutputPiece(
            "".join(unread.texts),
            tuple(unread.token_ids),
            unread.finish_reason,
            choice,
            "".join(unread.reasonings),
            merged_deltas(unread.tool_calls),
            tuple(unread.logprobs),
            unread.prompt_logprobs,
        )


def merged_deltas(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """The same parts of tool calls, with parts of one call that follow each other run together."""
    merged: list[ToolCallDelta] = []
    for delta in deltas:
        if merged and merged[-1].index == delta.index and not delta.name:
            merged[-1] = replace(merged[-1], arguments=merged[-1].arguments + delta.arguments)
        else:
            merged.append(delta)
    return tuple(merged)
