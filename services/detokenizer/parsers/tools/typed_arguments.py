"""JSON arguments out of formats that write each argument as bare text."""

from __future__ import annotations

from typing import Final

from headrace.argument_types import NULL_WORDS, TEXT, TEXT_OR_NULL
from services.detokenizer.parsers.characters import Source, Steps, copy_until, json_string, json_value
from services.detokenizer.parsers.reading import Reading, ToolTypes

_PYTHON_WORDS: Final = {"True": "true", "False": "false", "None": "null"}


class TypedArguments:
    """Writes one call's arguments. A string's characters are passed on as they come, anything else whole."""

    def __init__(self, reading: Reading, tools: ToolTypes, name: str) -> None:
        """Begin the call of `name`."""
        self._reading = reading
        self._tools = tools
        self._name = name
        self._num_arguments = 0
        reading.begin_call(name)

    def read_value(self, source: Source, key: str, closings: tuple[str, ...]) -> Steps[bool]:
        """Read an argument's text up to one of its closing markers; whether that came."""
        emit = self._reading.arguments
        emit(("{" if not self._num_arguments else ", ") + json_string(key) + ": ")
        self._num_arguments += 1
        types = self._tools.types(self._name, key)
        if types in (TEXT, TEXT_OR_NULL):
            return (yield from self._read_string(source, closings, nulls=NULL_WORDS if types == TEXT_OR_NULL else ()))
        chars: list[str] = []
        closing = yield from copy_until(source, chars.append, closings)
        text = "".join(chars)
        # Cut off, it is passed on as it is: nobody can say what it would have become.
        emit(_as_json(text) if closing else text)
        return bool(closing)

    def _read_string(self, source: Source, closings: tuple[str, ...], *, nulls: tuple[str, ...]) -> Steps[bool]:
        """Pass a string on; what may yet become a word for null is held back."""
        emit = self._reading.arguments
        held: str | None = ""

        def pass_on(text: str) -> None:
            nonlocal held
            if held is None:
                emit(json_string(text)[1:-1])
                return
            held += text
            if not any(word.startswith(held) for word in nulls):
                emit(json_string(held)[:-1])
                held = None

        closing = yield from copy_until(source, pass_on, closings)
        if held is not None:
            emit("null" if closing and held in nulls else json_string(held) if closing else held)
        elif closing:
            emit('"')
        return bool(closing)

    def end(self) -> None:
        """There are no more arguments."""
        self._reading.arguments("}" if self._num_arguments else "{}")


def _as_json(text: str) -> str:
    """A value as JSON: itself if it is JSON or Python's word for a constant, else a string."""
    value = text.strip()
    value = _PYTHON_WORDS.get(value, value)
    try:
        json_value(value)
    except ValueError:
        return json_string(text)
    return value
