"""Calls written as a Python list, `[f(a=1), g(b="x")]`, at the beginning of the output or behind `<|python_start|>` (Llama 4)."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Final

from services.detokenizer.parsers.characters import (
    SPACES,
    Source,
    Steps,
    copy_until,
    json_string,
    json_value,
    match,
    read_while,
    skip_spaces,
)
from services.detokenizer.parsers.reading import Reading, ToolTypes

_START: Final = "<|python_start|>"
_END: Final = "<|python_end|>"
_BRACKETS: Final = {"(": ")", "[": "]", "{": "}"}


def read_pythonic(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """Read the list, or give its text; then text."""
    lead = yield from skip_spaces(source)
    if (yield from match(source, _START)):
        lead += _START + (yield from skip_spaces(source))
    while True:
        if (yield from match(source, "[")):
            yield from _read_list(source, reading, tools, lead=lead + "[")
            yield from skip_spaces(source)
            yield from match(source, _END)
        else:
            reading.text(lead)
        lead = yield from copy_until(source, reading.text, (_START,))
        if not lead:
            return
        lead += yield from skip_spaces(source)


def _read_list(source: Source, reading: Reading, tools: ToolTypes, *, lead: str) -> Steps[None]:
    while True:
        lead += yield from skip_spaces(source)
        name = yield from read_while(source, lambda char: char.isalnum() or char in "_.-")
        lead += name
        if not tools.knows(name) or not (yield from match(source, "(")):
            reading.text(lead)
            return
        if not (yield from _read_call(source, reading, name, lead=lead + "(")):
            return
        yield from skip_spaces(source)
        if (yield from match(source, "]")):
            return
        if not (yield from match(source, ",")):
            return
        lead = ","


def _read_call(source: Source, reading: Reading, name: str, *, lead: str) -> Steps[bool]:
    """Arguments behind the "("; whether their ")" came."""
    lead += yield from skip_spaces(source)
    if (yield from match(source, ")")):
        reading.begin_call(name)
        reading.arguments("{}")
        return True
    is_first = True
    while True:
        key = yield from read_while(source, lambda char: char.isalnum() or char == "_")
        spaces = yield from skip_spaces(source)
        if not key or not (yield from match(source, "=")):
            # An argument without a name fits no function; before the first, nothing was called yet.
            (reading.text if is_first else reading.arguments)(lead + key + spaces)
            return False
        if is_first:
            reading.begin_call(name)
        reading.arguments(("{" if is_first else ", ") + json_string(key) + ": ")
        is_first = False
        lead = ""
        yield from skip_spaces(source)
        value, end = yield from _read_value(source)
        if not end:
            reading.arguments(value)
            return False
        reading.arguments(_to_json(value))
        if end == ")":
            reading.arguments("}")
            return True
        yield from skip_spaces(source)
        if (yield from match(source, ")")):
            reading.arguments("}")
            return True


def _read_value(source: Source) -> Steps[tuple[str, str]]:
    """A Python value's text and the "," or ")" behind it, which is read; "" when the text ends first."""
    chars: list[str] = []
    open_brackets: list[str] = []
    while char := (yield from source.read()):
        if not open_brackets and char in ",)":
            return "".join(chars), char
        chars.append(char)
        if char in "\"'":
            yield from _copy_string(source, chars, char)
        elif char in _BRACKETS:
            open_brackets.append(_BRACKETS[char])
        elif open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
    return "".join(chars), ""


def _copy_string(source: Source, chars: list[str], quote: str) -> Steps[None]:
    """Copy a string behind its first quote: to the next, or, where three begin it, to the next three."""
    num_quotes = 1
    if (yield from match(source, quote * 2)):
        num_quotes = 3
        chars.append(quote * 2)
    num_seen = 0
    while char := (yield from source.read()):
        chars.append(char)
        num_seen = num_seen + 1 if char == quote else 0
        if num_seen == num_quotes:
            return
        if char == "\\" and (escaped := (yield from source.read())):
            chars.append(escaped)


def _to_json(text: str) -> str:
    """A Python literal as JSON; JSON's own words pass, anything else becomes a string."""
    text = text.strip(SPACES)
    try:
        json_value(text)
    except ValueError:
        pass
    else:
        return text
    try:
        with warnings.catch_warnings():
            # Odd escapes in a model's strings are its own affair.
            warnings.simplefilter("ignore")
            return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return json_string(text)
