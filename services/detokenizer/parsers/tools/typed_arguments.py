"""JSON arguments out of formats that write each argument as bare text."""

from __future__ import annotations

from typing import Final

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
        is_string = self._tools.is_string(self._name, key)
        if is_string:
            emit('"')
            closing = yield from copy_until(source, lambda text: emit(json_string(text)[1:-1]), closings)
            if closing:
                emit('"')
            return bool(closing)
        chars: list[str] = []
        closing = yield from copy_until(source, chars.append, closings)
        text = "".join(chars)
        # Cut off, it is passed on as it is: nobody can say what it would have become.
        emit(_as_json(text) if closing else text)
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
