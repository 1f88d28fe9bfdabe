"""One stream's parser, what it has read that waits to be sent, and how much of it the router has already.

Tokens are read one at a time, so that reasoning tokens can be counted. Sent are reasoning and parts of tool calls beside the text;
when a stream is begun again elsewhere, as many characters of each are left out as the router has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.detokenizer.parsers.output_parser import OutputParser, ReadingOptions
from services.detokenizer.parsers.reading import CallPart


@dataclass(slots=True)
class SentCounts:
    """What a router has already, beside text."""

    num_reasoning_chars: int = 0
    num_tool_calls: int = 0
    num_argument_chars: int = 0


@dataclass(slots=True)
class Unsent:
    """What waits to be sent."""

    reasonings: list[str] = field(default_factory=list)
    calls: list[CallPart] = field(default_factory=list)


class StreamReader:
    """Reads the text of one stream."""

    __slots__ = ("_checkpoint", "_parser", "_skipped", "budget", "num_reasoning_tokens", "unsent")

    def __init__(self, options: ReadingOptions, sent: SentCounts) -> None:
        self.budget = options.reasoning_budget
        self.num_reasoning_tokens = 0
        """Output tokens that were reasoning or marked its bounds."""
        self.unsent = Unsent()
        self._parser = OutputParser(options)
        self._skipped = SentCounts(sent.num_reasoning_chars, sent.num_tool_calls, sent.num_argument_chars)
        self._checkpoint: _Checkpoint | None = None

    @property
    def is_budget_spent(self) -> bool:
        """Whether reasoning goes on that should not."""
        return self.budget is not None and self.num_reasoning_tokens >= self.budget and self._parser.is_reasoning

    def push(self, text: str) -> None:
        """Read the text of one token, which may be empty."""
        was_reasoning = self._parser.is_reasoning
        self._parser.push(text)
        if was_reasoning or self._parser.is_reasoning:
            self.num_reasoning_tokens += 1

    def finish(self, text: str, *, is_cut: bool) -> None:
        """Read the last text, after which nothing comes; cut off, or at an end that the model or a stop string made."""
        self._parser.push(text)
        self._parser.finish(is_cut=is_cut)

    def gather(self) -> str:
        """Put what was read with the unsent; gives the text."""
        text, reasoning, parts = self._parser.take()
        skipped = self._skipped
        if skipped.num_reasoning_chars and reasoning:
            num = min(len(reasoning), skipped.num_reasoning_chars)
            skipped.num_reasoning_chars -= num
            reasoning = reasoning[num:]
        if reasoning:
            self.unsent.reasonings.append(reasoning)
        for part in parts:
            if part.index < skipped.num_tool_calls:
                part.name = part.call_id = ""
            num = min(len(part.arguments), skipped.num_argument_chars)
            skipped.num_argument_chars -= num
            part.arguments = part.arguments[num:]
            if part.name or part.arguments:
                self.unsent.calls.append(part)
        return text

    @property
    def has_unsent(self) -> bool:
        """Whether reasoning or parts of calls wait."""
        return bool(self.unsent.reasonings or self.unsent.calls)

    def mark_sent(self) -> None:
        """The router's queue has what waited."""
        self.unsent = Unsent()
        self._checkpoint = None

    def mark(self) -> None:
        """Remember this point, to which `rewind` returns."""
        skipped = self._skipped
        self._checkpoint = _Checkpoint(
            self._parser.num_texts,
            self.num_reasoning_tokens,
            SentCounts(skipped.num_reasoning_chars, skipped.num_tool_calls, skipped.num_argument_chars),
            len(self.unsent.reasonings),
            len(self.unsent.calls),
        )

    def rewind(self) -> None:
        """Return to the point marked."""
        point = self._checkpoint
        assert point is not None, "only a stream that is marked is rewound"
        self._parser.rewind(point.num_texts)
        self.num_reasoning_tokens = point.num_reasoning_tokens
        skipped = point.skipped
        self._skipped = SentCounts(skipped.num_reasoning_chars, skipped.num_tool_calls, skipped.num_argument_chars)
        del self.unsent.reasonings[point.num_reasonings :]
        del self.unsent.calls[point.num_calls :]


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    num_texts: int
    num_reasoning_tokens: int
    skipped: SentCounts
    num_reasonings: int
    num_calls: int
