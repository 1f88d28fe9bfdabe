"""Calls written as JSON objects: `{"name": …, "arguments": {…}}`, alone, in arrays, behind markers.

Covers Hermes and Qwen (`<tool_call>`), Granite 3 (`<|tool_call|>`), Mistral (`[TOOL_CALLS]`), Llama 3 (`<|python_tag|>` or bare),
and plain JSON. Arguments are passed on as the model writes them. An object that turns out to be no call of a known tool is text,
from its first character.
"""

from __future__ import annotations

from typing import Final

from services.detokenizer.parsers.characters import (
    HELD_CHARS_MAX,
    SPACES,
    Emit,
    Source,
    Steps,
    copy_json_string,
    copy_json_value,
    copy_rest,
    copy_until,
    json_value,
    match,
    read_while,
    skip_spaces,
)
from services.detokenizer.parsers.reading import Reading, ToolTypes

_ARGUMENT_KEYS: Final = frozenset({"arguments", "parameters"})
_CALL_KEYS: Final = _ARGUMENT_KEYS | {"name", "type", "id"}


def read_hermes(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`<tool_call>{…}</tool_call>`, any number of them, between text."""
    while (yield from copy_until(source, reading.text, ("<tool_call>",))):
        lead = "<tool_call>" + (yield from skip_spaces(source))
        if not (yield from match(source, "{")):
            reading.text(lead)
        elif (yield from _Object(source, reading, tools, lead=lead).read()):
            yield from _skip(source, "</tool_call>")


def read_granite(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`<|tool_call|>`, then an array of calls, or one."""
    while tag := (yield from copy_until(source, reading.text, ("<|tool_call|>",))):
        lead = tag + (yield from skip_spaces(source))
        if (yield from match(source, "[")):
            yield from _read_array(source, reading, tools, lead=lead + "[")
        elif (yield from match(source, "{")):
            yield from _Object(source, reading, tools, lead=lead).read()
        else:
            reading.text(lead)


def read_json(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """An array of calls, or one; what follows is text."""
    lead = yield from skip_spaces(source)
    if (yield from match(source, "[")):
        yield from _read_array(source, reading, tools, lead=lead + "[")
    elif (yield from match(source, "{")):
        yield from _Object(source, reading, tools, lead=lead).read()
    else:
        reading.text(lead)
    yield from copy_rest(source, reading.text)


def read_llama3(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """Objects, split by ";" or ",", at the beginning or behind `<|python_tag|>`. A bare object needs its arguments to be a call."""
    lead = yield from skip_spaces(source)
    if not (yield from match(source, "{")):
        reading.text(lead)
    else:
        yield from _read_objects(source, reading, tools, lead=lead, is_bare=True)
    while tag := (yield from copy_until(source, reading.text, ("<|python_tag|>",))):
        lead = tag + (yield from skip_spaces(source))
        if not (yield from match(source, "{")):
            reading.text(lead)
        else:
            yield from _read_objects(source, reading, tools, lead=lead, is_bare=False)


def read_mistral(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`[TOOL_CALLS]`, then an array of calls, or one name and its arguments (`[ARGS]` between them in newer models)."""
    while tag := (yield from copy_until(source, reading.text, ("[TOOL_CALLS]",))):
        lead = tag + (yield from skip_spaces(source))
        if (yield from match(source, "[")):
            yield from _read_array(source, reading, tools, lead=lead + "[")
        else:
            yield from _read_named(source, reading, tools, lead=lead)


def _read_named(source: Source, reading: Reading, tools: ToolTypes, *, lead: str) -> Steps[None]:
    name = yield from read_while(source, lambda char: char not in SPACES + "[{<")
    raw = lead + name
    call_id = ""
    if (yield from match(source, "[CALL_ID]")):
        call_id = yield from read_while(source, str.isalnum)
        raw += "[CALL_ID]" + call_id
    if (yield from match(source, "[ARGS]")):
        raw += "[ARGS]"
    spaces = yield from skip_spaces(source)
    if not tools.knows(name) or not (yield from match(source, "{")):
        reading.text(raw + spaces)
        return
    source.put_back("{")
    reading.begin_call(name, call_id)
    yield from copy_json_value(source, reading.arguments)


def _read_array(source: Source, reading: Reading, tools: ToolTypes, *, lead: str) -> Steps[None]:
    """Read calls behind the array's "["; stops at the first thing that is none."""
    while True:
        lead += yield from skip_spaces(source)
        if not (yield from match(source, "{")):
            break
        if not (yield from _Object(source, reading, tools, lead=lead).read()):
            return
        lead = yield from skip_spaces(source)
        if not (yield from match(source, ",")):
            break
        lead = ","
    if not (yield from match(source, "]")):
        reading.text(lead)
    elif lead.strip(SPACES):
        # An empty array calls nothing.
        reading.text(lead + "]")


def _read_objects(source: Source, reading: Reading, tools: ToolTypes, *, lead: str, is_bare: bool) -> Steps[None]:
    while (yield from _Object(source, reading, tools, lead=lead, is_bare=is_bare).read()):
        lead = yield from skip_spaces(source)
        separator = yield from source.read()
        if separator and separator in ";,":
            lead += separator + (yield from skip_spaces(source))
            if (yield from match(source, "{")):
                continue
            reading.text(lead)
        else:
            source.put_back(lead + separator)
        return


def _skip(source: Source, literal: str) -> Steps[None]:
    spaces = yield from skip_spaces(source)
    if not (yield from match(source, literal)):
        source.put_back(spaces)


class _Object:
    """Reads one object behind its "{"."""

    def __init__(self, source: Source, reading: Reading, tools: ToolTypes, *, lead: str, is_bare: bool = False) -> None:
        """Prepare.

        Args:
            source: Characters.
            reading: Where a call goes.
            tools: What may be called.
            lead: What stood before the "{" and is text when this is no call.
            is_bare: No marker says that this is a call: any other key than a call's, or no arguments, and it is text.
        """
        self._source = source
        self._reading = reading
        self._tools = tools
        self._is_bare = is_bare
        self._raw = [lead, "{"]
        self._num_raw = 0
        self._name = ""
        self._held_arguments = ""
        self._is_begun = False

    def read(self) -> Steps[bool]:
        """Read to the object's end, or to where it stops being a call; whether there was a call."""
        if (yield from self._read_members()):
            if not self._is_begun and self._tools.knows(self._name) and not self._is_bare:
                self._begin("{}")
            if self._is_begun:
                return True
        self._reading.text("".join(self._raw))
        return self._is_begun

    def _keep(self, char: str) -> None:
        self._raw.append(char)
        self._num_raw += 1

    def _visible(self) -> Steps[str]:
        """The next character that is no white space, read and kept."""
        while (char := (yield from self._source.read())) and char in SPACES:
            self._keep(char)
        if char:
            self._keep(char)
        return char

    def _reject(self, char: str) -> bool:
        """The character that was kept last does not belong here."""
        if char:
            self._raw.pop()
            self._source.put_back(char)
        return False

    def _read_members(self) -> Steps[bool]:
        """Read keys and values up to the "}"; False where the form breaks."""
        is_first = True
        while True:
            char = yield from self._visible()
            if char == "}":
                return True
            if not is_first:
                if char != ",":
                    return self._reject(char)
                char = yield from self._visible()
            is_first = False
            if char != '"':
                return self._reject(char)
            key = yield from self._string()
            char = yield from self._visible()
            if key is None or char != ":":
                return self._reject(char)
            if not (yield from self._read_value(key)) or self._num_raw > HELD_CHARS_MAX:
                return False

    def _string(self) -> Steps[str | None]:
        """The rest of a string behind its quote."""
        chars = ['"']
        if not (yield from copy_json_string(self._source, chars.append)):
            for char in chars[1:]:
                self._keep(char)
            return None
        for char in chars[1:]:
            self._keep(char)
        try:
            value = json_value("".join(chars))
        except ValueError:
            return None
        return value if isinstance(value, str) else None

    def _read_value(self, key: str) -> Steps[bool]:
        if self._is_bare and not self._is_begun and key not in _CALL_KEYS:
            return False
        char = yield from self._visible()
        if key == "name" and not self._name:
            if char != '"':
                return self._reject(char)
            name = yield from self._string()
            if name is None or not self._tools.knows(name):
                return False
            self._name = name
            if self._held_arguments:
                self._begin(self._held_arguments)
            return True
        if key in _ARGUMENT_KEYS and not self._is_begun and not self._held_arguments:
            return (yield from self._read_arguments(char))
        return (yield from self._copy_value(char, self._keep))

    def _read_arguments(self, char: str) -> Steps[bool]:
        if char == "{" and self._name:
            self._begin("")
            return (yield from self._copy_value(char, self._reading.arguments, is_kept=False))
        start = len(self._raw) - 1
        if not (yield from self._copy_value(char, self._keep)):
            return False
        text = "".join(self._raw[start:])
        if text.startswith('"'):
            # Arguments as JSON in a string.
            try:
                text = str(json_value(text))
            except ValueError:
                return False
        self._held_arguments = "{}" if text in ("null", "") else text
        if self._name:
            self._begin(self._held_arguments)
        return True

    def _copy_value(self, char: str, emit: Emit, *, is_kept: bool = True) -> Steps[bool]:
        """Copy a value whose first character was read."""
        if not char:
            return False
        if is_kept:
            self._raw.pop()
        self._source.put_back(char)
        return (yield from copy_json_value(self._source, emit))

    def _begin(self, arguments: str) -> None:
        self._reading.begin_call(self._name)
        self._is_begun = True
        self._raw.clear()
        self._num_raw = 0
        if arguments:
            self._reading.arguments(arguments)
