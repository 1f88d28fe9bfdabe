"""Calls written as tags: Qwen3-Coder (`<function=…>`), MiniMax (`<invoke name="…">`), GLM (`<arg_key>`)."""

from __future__ import annotations

from dataclasses import dataclass

from services.detokenizer.parsers.characters import SPACES, Source, Steps, copy_until, match, read_while, skip_spaces
from services.detokenizer.parsers.reading import Reading, ToolTypes
from services.detokenizer.parsers.tools.typed_arguments import TypedArguments


@dataclass(frozen=True, slots=True)
class _Tags:
    """The tags of a format; names stand between an `…_open` and `name_end`."""

    section: str
    section_end: str
    call_open: str
    call_end: str
    argument_open: str
    argument_end: str
    name_end: str


_QWEN3_CODER = _Tags("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>", ">")
_MINIMAX = _Tags(
    "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', "</invoke>", '<parameter name="', "</parameter>", '">'
)


def read_qwen3_coder(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`; the outer tag may be missing."""
    yield from _read_tagged(source, reading, tools, _QWEN3_CODER)


def read_minimax(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`<minimax:tool_call><invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke></minimax:tool_call>`."""
    yield from _read_tagged(source, reading, tools, _MINIMAX)


def read_glm(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`."""
    while tag := (yield from copy_until(source, reading.text, ("<tool_call>",))):
        raw = tag + (yield from skip_spaces(source))
        name = yield from read_while(source, lambda char: char not in SPACES + "<")
        raw += name + (yield from skip_spaces(source))
        if not tools.knows(name):
            reading.text(raw)
            continue
        if (yield from match(source, "</tool_call>")):
            TypedArguments(reading, tools, name).end()
            continue
        if not (yield from match(source, "<arg_key>")):
            reading.text(raw)
            continue
        yield from _read_pairs(source, TypedArguments(reading, tools, name))


def _read_pairs(source: Source, arguments: TypedArguments) -> Steps[None]:
    """GLM's keys and values, behind the first `<arg_key>`; what does not fit ends the call and is text."""
    while True:
        key: list[str] = []
        if not (yield from copy_until(source, key.append, ("</arg_key>",))):
            source.put_back("".join(key))
            return
        yield from skip_spaces(source)
        if not (yield from match(source, "<arg_value>")):
            source.put_back("".join(key))
            return
        if not (yield from arguments.read_value(source, "".join(key).strip(), ("</arg_value>",))):
            return
        yield from skip_spaces(source)
        if not (yield from match(source, "<arg_key>")):
            arguments.end()
            yield from match(source, "</tool_call>")
            return


def _read_tagged(source: Source, reading: Reading, tools: ToolTypes, tags: _Tags) -> Steps[None]:
    while tag := (yield from copy_until(source, reading.text, (tags.section, tags.call_open))):
        raw = tag
        if tag == tags.section:
            raw += yield from skip_spaces(source)
            if not (yield from match(source, tags.call_open)):
                reading.text(raw)
                continue
            raw += tags.call_open
        name = yield from read_while(source, lambda char: char not in '<>"\n')
        if not tools.knows(name) or not (yield from match(source, tags.name_end)):
            reading.text(raw + name)
            continue
        yield from _read_parameters(source, TypedArguments(reading, tools, name), tags)


def _read_parameters(source: Source, arguments: TypedArguments, tags: _Tags) -> Steps[None]:
    """Parameters up to the call's end. The line breaks that set a value off are no part of it."""
    while True:
        spaces = yield from skip_spaces(source)
        if not (yield from match(source, tags.argument_open)):
            if not (yield from match(source, tags.call_end)) and not (yield from match(source, tags.section_end)):
                # Neither a parameter nor the end: whatever it is, it is text.
                source.put_back(spaces)
                if (yield from _is_over(source)):
                    return
                arguments.end()
                return
            arguments.end()
            spaces = yield from skip_spaces(source)
            if not (yield from match(source, tags.section_end)):
                source.put_back(spaces)
            return
        key = yield from read_while(source, lambda char: char not in '<>"\n')
        yield from match(source, tags.name_end)
        yield from match(source, "\n")
        if not (yield from arguments.read_value(source, key.strip(), ("\n" + tags.argument_end, tags.argument_end))):
            return


def _is_over(source: Source) -> Steps[bool]:
    spaces = yield from skip_spaces(source)
    char = yield from source.read()
    source.put_back(spaces + char)
    return not char
