"""Parsers as coroutines that ask for one character at a time, and the small steps they are made of.

A parser is a generator: each `yield` waits for the next character, "" tells the end. So it cannot know how the text was cut, what
it gives after a text depends on that text alone, and it never backtracks further than what it has put back itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import Final, TypeVar

_Result = TypeVar("_Result")
Steps = Generator[None, str, _Result]
"""A step of a parser: asks for characters, and gives a result at its end."""
Emit = Callable[[str], None]

SPACES: Final = " \t\r\n"
HELD_CHARS_MAX: Final = 1 << 20
"""Most characters that a parser keeps back until it knows what they are."""


class Source:
    """The characters of one text, in order; some may be put back."""

    __slots__ = ("_is_over", "_put_back")

    def __init__(self) -> None:
        self._put_back: list[str] = []
        self._is_over = False

    def read(self) -> Steps[str]:
        """The next character; "" at the end of the text, as often as asked."""
        if self._put_back:
            return self._put_back.pop()
        if self._is_over:
            return ""
        char = yield
        self._is_over = not char
        return char

    def put_back(self, text: str) -> None:
        """Have these characters read again, first to last."""
        self._put_back.extend(reversed(text))


def copy_until(source: Source, emit: Emit, markers: Sequence[str]) -> Steps[str]:
    """Emit text up to a marker, which is read and given; at the end of the text "". What may begin a marker is held back.

    No marker may stand inside another, except at its end.
    """
    firsts = {marker[0] for marker in markers}
    held = ""
    while True:
        char = yield from source.read()
        if not char:
            if held:
                emit(held)
            return ""
        if not held and char not in firsts:
            emit(char)
            continue
        held += char
        while held and held not in markers and not any(marker.startswith(held) for marker in markers):
            emit(held[0])
            held = held[1:]
        if held in markers:
            return held


def copy_rest(source: Source, emit: Emit) -> Steps[None]:
    """Emit all that comes."""
    while char := (yield from source.read()):
        emit(char)


def skip_spaces(source: Source) -> Steps[str]:
    """Read white space; gives it."""
    spaces = ""
    while (char := (yield from source.read())) and char in SPACES:
        spaces += char
    source.put_back(char)
    return spaces


def match(source: Source, literal: str) -> Steps[bool]:
    """Read `literal` if it comes next; else nothing is read."""
    for index, wanted in enumerate(literal):
        char = yield from source.read()
        if char != wanted:
            source.put_back(literal[:index] + char)
            return False
    return True


def read_while(source: Source, allowed: Callable[[str], bool], *, most: int = 256) -> Steps[str]:
    """Read characters that are allowed, up to a number of them."""
    found = ""
    while len(found) < most:
        char = yield from source.read()
        if not char or not allowed(char):
            source.put_back(char)
            break
        found += char
    return found


def copy_json_string(source: Source, emit: Emit) -> Steps[bool]:
    """Emit the rest of a JSON string, behind its opening quote and with its closing one; whether that came."""
    while char := (yield from source.read()):
        emit(char)
        if char == '"':
            return True
        if char == "\\" and (escaped := (yield from source.read())):
            emit(escaped)
    return False


def copy_json_value(source: Source, emit: Emit) -> Steps[bool]:
    """Emit one JSON value as it stands; whether it came to its end. Brackets and strings are followed, nothing else is checked."""
    depth = 0
    is_empty = True
    while char := (yield from source.read()):
        if not depth and char in ",]}" + SPACES:
            # The end of a number or a word, which is no part of it.
            source.put_back(char)
            return not is_empty
        emit(char)
        is_empty = False
        if char == '"':
            if not (yield from copy_json_string(source, emit)):
                return False
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
        if not depth and char in '"}]':
            return True
    return not depth and not is_empty


def json_value(text: str) -> object:
    """A JSON value, without NaN and infinities.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(name)


def json_string(text: str) -> str:
    """A text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)
