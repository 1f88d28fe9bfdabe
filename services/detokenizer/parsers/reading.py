"""What a parser has made of a stream's text: text, reasoning and parts of tool calls, until they are taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from headrace.argument_types import ANY, Types, argument_types
from headrace.errors import ProtocolError
from services.detokenizer.parsers.characters import SPACES

_SPACES_HELD_MAX: Final = 1024


@dataclass(slots=True)
class CallPart:
    """New characters of a call's arguments; the first part of a call has its name, and its id if the model gave one."""

    index: int
    name: str = ""
    call_id: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolTypes:
    """The tools that may be called, and the types of their arguments: by tool and argument."""

    arguments: Mapping[str, Mapping[str, Types]] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        """Whether a call of this name is a call. Without any tools, all are."""
        return bool(name) and (not self.arguments or name in self.arguments)

    def types(self, name: str, argument: str) -> Types:
        """What an argument may be, as far as its schema tells."""
        return self.arguments.get(name, {}).get(argument, ANY)

    @staticmethod
    def from_json(text: str) -> ToolTypes:
        """Read tools as `OutputReading.tools` carries them.

        Raises:
            ProtocolError: They have another form.
        """
        if not text:
            return ToolTypes()
        try:
            functions = [tool["function"] for tool in json.loads(text)]
            return ToolTypes({function["name"]: argument_types(function.get("parameters")) for function in functions})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"open_stream: the tools cannot be read: {error}") from error


class Reading:
    """Gathers what parsers find. Calls follow each other: arguments belong to the latest."""

    __slots__ = (
        "_calls",
        "_held_reasoning",
        "_is_call_bare",
        "_is_reasoning_held",
        "_reasoning",
        "_spaces",
        "_text",
        "_trims_calls",
        "num_calls",
    )

    def __init__(self, *, trims_calls: bool = False, holds_reasoning: bool = False) -> None:
        """Begin with nothing.

        Args:
            trims_calls: Leave out white space before and behind tool calls.
            holds_reasoning: Give reasoning whole, when something else follows.
        """
        self.num_calls = 0
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[CallPart] = []
        # The latest call has no character of arguments yet.
        self._is_call_bare = False
        self._trims_calls = trims_calls
        self._spaces = ""
        self._is_reasoning_held = holds_reasoning
        self._held_reasoning: list[str] = []

    def text(self, text: str) -> None:
        """Text of the answer."""
        if text:
            self.end_call()
        if self._held_reasoning:
            self._release_reasoning()
        if not self._trims_calls:
            self._text.append(text)
            return
        words = text.rstrip(SPACES)
        if words:
            self._text.append(self._spaces + words)
            self._spaces = text[len(words) :]
        else:
            self._spaces += text
        num_over = len(self._spaces) - _SPACES_HELD_MAX
        if num_over > 0:
            self._text.append(self._spaces[:num_over])
            self._spaces = self._spaces[num_over:]

    def reasoning(self, text: str) -> None:
        """Reasoning."""
        self.end_call()
        (self._held_reasoning if self._is_reasoning_held else self._reasoning).append(text)

    def begin_call(self, name: str, call_id: str = "") -> None:
        """A call begins."""
        self.end_call()
        self._release_reasoning()
        self._spaces = ""
        self._calls.append(CallPart(self.num_calls, name, call_id))
        self.num_calls += 1
        self._is_call_bare = True

    def end_call(self) -> None:
        """The latest call is over: without any argument its arguments are an empty object."""
        if self._is_call_bare:
            self.arguments("{}")

    def arguments(self, text: str) -> None:
        """Characters of the latest call's arguments."""
        if not text:
            return
        self._is_call_bare = False
        index = self.num_calls - 1
        if self._calls and self._calls[-1].index == index:
            self._calls[-1].arguments += text
        else:
            self._calls.append(CallPart(index, arguments=text))

    def finish(self, *, is_cut: bool) -> None:
        """Nothing follows: give what was held back. A call that was cut off stays as it is."""
        if not is_cut:
            self.end_call()
        self._release_reasoning()
        if self._spaces and not self.num_calls:
            self._text.append(self._spaces)
        self._spaces = ""

    def take(self) -> tuple[str, str, list[CallPart]]:
        """Text, reasoning and parts of calls since the last time."""
        text, reasoning, calls = "".join(self._text), "".join(self._reasoning), self._calls
        self._text.clear()
        self._reasoning.clear()
        self._calls = []
        return text, reasoning, calls

    def _release_reasoning(self) -> None:
        self._reasoning += self._held_reasoning
        self._held_reasoning.clear()
