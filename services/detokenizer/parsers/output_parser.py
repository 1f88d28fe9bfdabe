"""Reads one stream's text: takes it as it comes, gives text, reasoning and parts of tool calls.

A parser has no state that could be copied, being a coroutine; it remembers the text that it was given, and returns to an earlier
point by reading it again. That is rare: only a router that does not read makes a stream go back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from headrace.errors import ProtocolError
from headrace.output_formats import REASONING_FORMATS
from services.detokenizer.parsers import harmony
from services.detokenizer.parsers.characters import Source, Steps, copy_rest
from services.detokenizer.parsers.reading import CallPart, Reading, ToolTypes
from services.detokenizer.parsers.reasoning.think_block import ThinkBlock
from services.detokenizer.parsers.tools import json_calls, marked_calls, pythonic, xml_calls

_ReadTools = Callable[[Source, Reading, ToolTypes], Steps[None]]
_HARMONY: Final = "gpt_oss"


@dataclass(frozen=True, slots=True)
class _ToolFormat:
    """A parser, and the markers that must not be skipped as special tokens."""

    read: _ReadTools
    markers: tuple[str, ...] = ()


_TOOL_FORMATS: Final[Mapping[str, _ToolFormat]] = MappingProxyType(
    {
        "deepseek_v3": _ToolFormat(marked_calls.read_deepseek_v3, marked_calls.DEEPSEEK_MARKERS),
        "deepseek_v31": _ToolFormat(marked_calls.read_deepseek_v31, marked_calls.DEEPSEEK_MARKERS),
        "glm": _ToolFormat(
            xml_calls.read_glm, ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
        ),
        "granite": _ToolFormat(json_calls.read_granite, ("<|tool_call|>",)),
        "hermes": _ToolFormat(json_calls.read_hermes, ("<tool_call>", "</tool_call>")),
        "json": _ToolFormat(json_calls.read_json),
        "kimi_k2": _ToolFormat(marked_calls.read_kimi_k2, marked_calls.KIMI_MARKERS),
        "llama3_json": _ToolFormat(json_calls.read_llama3, ("<|python_tag|>",)),
        "minimax": _ToolFormat(xml_calls.read_minimax, ("<minimax:tool_call>", "</minimax:tool_call>")),
        "mistral": _ToolFormat(json_calls.read_mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
        "pythonic": _ToolFormat(pythonic.read_pythonic, ("<|python_start|>", "<|python_end|>")),
        "qwen3_coder": _ToolFormat(xml_calls.read_qwen3_coder, ("<tool_call>", "</tool_call>")),
    }
)


@dataclass(frozen=True, slots=True)
class ReadingOptions:
    """How a stream's text is to be read; empty formats are not looked for."""

    tool_format: str = ""
    reasoning_format: str = ""
    starts_in_reasoning: bool = False
    tools: str = ""
    keeps_reasoning_in_text: bool = False
    holds_reasoning: bool = False
    reasoning_budget: int | None = None

    def check(self) -> None:
        """Refuse formats that nobody knows.

        Raises:
            ProtocolError: Names the format.
        """
        if self.tool_format and self.tool_format not in _TOOL_FORMATS and self.tool_format != _HARMONY:
            raise ProtocolError(f"open_stream: tool format {self.tool_format!r} is not known here")
        if self.reasoning_format and self.reasoning_format not in REASONING_FORMATS:
            raise ProtocolError(f"open_stream: reasoning format {self.reasoning_format!r} is not known here")

    @property
    def markers(self) -> frozenset[str]:
        """Texts of special tokens that the parsers need to see."""
        if _HARMONY in (self.tool_format, self.reasoning_format):
            return frozenset(harmony.MARKERS)
        found: set[str] = set()
        if self.tool_format:
            found.update(_TOOL_FORMATS[self.tool_format].markers)
        if self.reasoning_format:
            form = REASONING_FORMATS[self.reasoning_format]
            found.update((form.opening, form.closing))
        return frozenset(found)


class OutputParser:
    """Reads the text of one stream."""

    def __init__(self, options: ReadingOptions) -> None:
        """Prepare to read.

        Args:
            options: They have passed `check`.
        """
        self._options = options
        self._tools = ToolTypes.from_json(options.tools)
        self._texts: list[str] = []
        self._begin()

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as can be seen."""
        if self._harmony is not None:
            return self._harmony.is_reasoning
        return self._block is not None and self._block.is_inside and not self._block.is_over

    @property
    def num_texts(self) -> int:
        """Texts read; `rewind` takes it."""
        return len(self._texts)

    def push(self, text: str) -> None:
        """Read the next text."""
        if text:
            self._texts.append(text)
            self._feed(text)

    def finish(self, *, is_cut: bool = False) -> None:
        """The text is over; cut off, or ended by the model (whose end tokens make no text) or by a stop string."""
        self._first.feed_end()
        if self._second is not None:
            self._second.feed_end()
        self._reading.finish(is_cut=is_cut)

    def take(self) -> tuple[str, str, list[CallPart]]:
        """Text, reasoning and parts of calls since the last time."""
        return self._reading.take()

    def rewind(self, num_texts: int) -> None:
        """Return to where so many texts had been read, and all of them taken."""
        texts = self._texts[:num_texts]
        self._begin()
        self._texts = texts
        for text in texts:
            self._feed(text)
        self._reading.take()

    def _begin(self) -> None:
        options = self._options
        self._reading = Reading(trims_calls=bool(options.tool_format), holds_reasoning=options.holds_reasoning)
        self._block: ThinkBlock | None = None
        self._harmony: harmony.Harmony | None = None
        self._second: _Stage | None = None
        if _HARMONY in (options.tool_format, options.reasoning_format):
            self._harmony = harmony.Harmony(keeps_reasoning=options.keeps_reasoning_in_text or not options.reasoning_format)
            tools = self._tools if options.tool_format else None
            source = Source()
            self._first = _Stage(source, self._harmony.read(source, self._reading, tools))
            return
        self._second = _tool_stage(options, self._reading, self._tools)
        if not options.reasoning_format:
            self._first, self._second = self._second, None
            return
        form = REASONING_FORMATS[options.reasoning_format]
        self._block = ThinkBlock(form, starts_inside=options.starts_in_reasoning, keeps_markers=options.keeps_reasoning_in_text)
        source = Source()
        self._first = _Stage(source, self._block.read(source, self._reading.reasoning, self._feed_text))

    def _feed(self, text: str) -> None:
        if self._block is not None and self._block.is_over and self._second is not None:
            self._second.feed(text)
        else:
            self._first.feed(text)

    def _feed_text(self, text: str) -> None:
        """Text of the first stage: what stays of a reasoning block goes past the second, which would look for calls in it."""
        assert self._block is not None
        assert self._second is not None
        if self._block.is_over:
            self._second.feed(text)
        else:
            self._reading.text(text)


class _Stage:
    """A coroutine and how far it is."""

    def __init__(self, source: Source, steps: Steps[None]) -> None:
        self._steps = steps
        self._is_over = False
        next(steps)

    def feed(self, text: str) -> None:
        """Give it text."""
        for char in text:
            self._send(char)

    def feed_end(self) -> None:
        """Tell it that there is no more."""
        self._send("")

    def _send(self, char: str) -> None:
        if self._is_over:
            return
        try:
            self._steps.send(char)
        except StopIteration:
            self._is_over = True


def _tool_stage(options: ReadingOptions, reading: Reading, tools: ToolTypes) -> _Stage:
    source = Source()
    if not options.tool_format:
        return _Stage(source, copy_rest(source, reading.text))
    return _Stage(source, _TOOL_FORMATS[options.tool_format].read(source, reading, tools))
