"""Grammars for `tool_choice: auto`: free text, in which a call that begins is a right one. Pure.

The text is free until the mark that begins a call in the model's own format. From there on the name must be that of a tool, and the
arguments of a strict tool must fit its schema; those of others are as the model writes them. Formats in which nothing marks the
beginning of a call (`llama3_json`, `pythonic`, `gpt_oss`, `json`) have no such grammar.

Where arguments are written as bare text (`qwen3_coder`, `minimax`, `glm`) they come in the order of the schema's properties,
strings as they are, null where an argument may be a string too as that word, anything else as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from headrace.argument_types import NULL, TEXT, TEXT_OR_NULL, Types, argument_types
from services.tokenizer.constraints.bare_strings import BareString, bare_strings
from services.tokenizer.constraints.json_schema import RESTRICTING, Schema, SchemaError, enforceable
from services.tokenizer.constraints.literals import ANY_TEXT, Literals, escaped, quoted
from services.tokenizer.constraints.reasoning_first import SPACE

_NO_ARGUMENTS: Final[Schema] = {"type": "object", "properties": {}}
_KEY_ENDS: Final = frozenset('<>"\n')


@dataclass(frozen=True, slots=True)
class _Tool:
    """A tool; `schema` is None where its arguments are free, `path` is where the schema stands in the source."""

    name: str
    schema: Schema | None
    path: str


def takes_call_grammar(tool_format: str) -> bool:
    """Whether something marks the beginning of a call in a format."""
    return tool_format in _FORMATS


class CallGrammar:
    """Builds one grammar.

    Args:
        literals: Of the model's vocabulary.
        options: What the compiler is told with every schema.
        excluded_start: A regular expression of what free text must not begin with; empty for nothing.
    """

    def __init__(self, literals: Literals, options: Mapping[str, Any], *, excluded_start: str = "") -> None:
        self._literals = literals
        self._options = options
        self._but = f" & ~/{excluded_start}/" if excluded_start else ""
        self._rules = ["%llguidance {}", f"SPACE: {SPACE}", f"TEXT: /{ANY_TEXT}/{self._but}"]

    def grammar(self, source: Any, tool_format: str) -> str:
        """The grammar of tools as the router names them, for the compiler.

        Args:
            source: `{"tools": [{"name", "parameters", "is_strict"}, …], "is_parallel"}`.
            tool_format: One for which there is such a grammar.

        Raises:
            SchemaError: A strict tool's schema cannot be enforced; names the path in the source.
        """
        tools = [_tool(each, f"#/tools/{index}/parameters") for index, each in enumerate(source["tools"])]
        form = _FORMATS[tool_format]
        call = self._rule(f"{self._lead(form.trigger, form.loose)} ({form.write(self, tools, bool(source['is_parallel']))})")
        free = self._free(form.loose)
        self._rules.append(f"start: {call}* {free}" if source["is_parallel"] else f"start: {call} | {free}")
        return json.dumps({"grammars": [{"lark_grammar": "\n".join(self._rules)}]}, ensure_ascii=False)

    # Text.

    def _free(self, loose: Sequence[str]) -> str:
        marks = self._marks(loose)
        return f"TEXT ({marks} TEXT)*" if marks else "TEXT"

    def _lead(self, trigger: str, loose: Sequence[str]) -> str:
        """Free text up to the mark of a call, and the mark."""
        if self._literals.is_special(trigger):
            return f"{self._free(loose)} {self._literals.write(trigger)}"
        marks = self._marks(loose)
        before = f"(TEXT {marks})* " if marks else ""
        found = self._rule(f"/{ANY_TEXT}{escaped(trigger)}/{self._but}", is_token=True)
        return before + self._rule(found, options="[lazy]")

    def _marks(self, loose: Sequence[str]) -> str:
        """Special tokens that may stand in free text; those that are text are part of it anyway."""
        found = [self._literals.write(mark) for mark in loose if self._literals.is_special(mark)]
        return f"({' | '.join(found)})" if found else ""

    def until(self, end: str, text: str = f"/{ANY_TEXT}/", *, inner: Sequence[str] = ()) -> str:
        """Text up to and with `end`, which does not stand in it; `inner` are marks that may, should they be special tokens."""
        token, marks = self._rule(text, is_token=True), self._marks(inner)
        if self._literals.is_special(end):
            return f"{token} {f'({marks} {token})*' if marks else ''} {self._literals.write(end)}"
        before = f"({token} {marks})* " if marks else ""
        return before + self._rule(f"{token} {quoted(end)}", options="[lazy]")

    def literal(self, text: str) -> str:
        """Fixed text."""
        return self._literals.write(text)

    def json_value(self, schema: Schema) -> str:
        """JSON that fits a schema."""
        return self._rule(f"%json {json.dumps({**schema, 'x-guidance': self._options}, ensure_ascii=False)}")

    def arguments(self, tool: _Tool, end: str, *, fence: str = "") -> str:
        """A call's arguments as JSON, with what ends the call."""
        if tool.schema is None:
            return self.until(end)
        return f"SPACE? {self.json_value(tool.schema)} SPACE? {self.literal(fence + end) if fence + end else ''}"

    # One argument after the other, each by itself.

    def bare_arguments(self, tool: _Tool, before_key: str, after_key: str, end: str) -> str:
        """Each argument of a strict tool as its key between two texts, and its value up to `end`; a line break behind each."""
        assert tool.schema is not None
        properties = tool.schema.get("properties", {})
        unknown = RESTRICTING & set(tool.schema) - {"type", "properties", "required", "additionalProperties"}
        if unknown:
            raise SchemaError(
                f"{tool.path}/{min(unknown)}",
                "cannot be enforced for a strict tool of this model, which writes arguments as bare text",
            )
        required = tool.schema.get("required", ())
        for key in required:
            if key not in properties:
                raise SchemaError(f"{tool.path}/required", f"must name properties only; got {key!r}")
        types = argument_types(tool.schema)
        parts = []
        for key, schema in properties.items():
            path = f"{tool.path}/properties/{key}"
            if not key or key != key.strip() or _KEY_ENDS & set(key):
                raise SchemaError(path, "is no name that this model can write")
            if schema is False:
                # It may not be given.
                if key in required:
                    raise SchemaError(path, "false allows nothing")
                continue
            value = self._bare_value(schema, types[key], tool, path, end)
            one = self._rule(f'{self.literal(before_key + key + after_key)} {value} "\\n"')
            parts.append(one if key in required else f"{one}?")
        return " ".join(parts)

    def _bare_value(self, schema: Schema, types: Types, tool: _Tool, path: str, end: str) -> str:
        assert tool.schema is not None
        if types not in (TEXT, TEXT_OR_NULL):
            definitions = {name: value for name, value in tool.schema.items() if name not in RESTRICTING}
            return f"{self.json_value({**definitions, **schema})} {self.literal(end)}"
        strings = bare_strings(schema, path, root=tool.schema, root_path=tool.path)
        # Line breaks at either end may be taken for those that set a value off.
        values = [value for kind in strings.kinds for value in kind.values or ()]
        values = [value for value in values if value and value == value.strip("\n") and end.strip() not in value]
        values += [NULL] if strings.has_null else []
        texts = [_text(kind) for kind in strings.kinds if kind.values is None]
        if texts:
            texts += [f"/{escaped(value)}/" for value in values]
            return self.until(end, f"({' | '.join(texts)}) & ~/(?s:.*){escaped(end.strip())}(?s:.*)/")
        if not values:
            raise SchemaError(path, "allows no string that this model can write")
        return f"({' | '.join(self.literal(value) for value in values)}) {self.literal(end)}"

    def _rule(self, body: str, *, is_token: bool = False, options: str = "") -> str:
        name = f"{'C' if is_token else 'c'}{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name


def _tool(value: Any, path: str) -> _Tool:
    if not value["is_strict"]:
        return _Tool(value["name"], None, path)
    try:
        return _Tool(value["name"], {"type": "object", **enforceable(value["parameters"] or _NO_ARGUMENTS)}, path)
    except SchemaError as error:
        raise SchemaError(path + error.path[1:], error.reason) from error


def _text(kind: BareString) -> str:
    """An expression for strings of some lengths; none that a line break could make shorter than they must be."""
    least, most = kind.min_length, kind.max_length
    if not least:
        return f"/{ANY_TEXT}/" if most is None else f"/(?s:.{{0,{most}}})/"
    longest = "" if most is None else most - 1
    return rf"(/[^\n](?s:.{{{least - 1},{longest}}})/ & ~/(?s:.*)\n/)"


_Write = Callable[[CallGrammar, Sequence[_Tool], bool], str]


def _any_of(alternatives: Sequence[str]) -> str:
    return " | ".join(alternatives)


def _object(build: CallGrammar, tool: _Tool, end: str) -> str:
    """`{"name": …, "arguments": …}` and what ends the call."""
    begin = f'"{{" SPACE? {quoted(quoted("name"))} SPACE? ":" SPACE? {quoted(quoted(tool.name))}'
    if tool.schema is None:
        return f"{begin} {build.arguments(tool, end)}"
    key = f'SPACE? "," SPACE? {quoted(quoted("arguments"))} SPACE? ":"'
    return f"{begin} {key} {build.arguments(tool, '')} " + f'"}}" SPACE? {build.literal(end) if end else ""}'


def _write_hermes(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
    return f"SPACE? ({_any_of([_object(build, tool, '</tool_call>') for tool in tools])})"


def _with_end(tools: Sequence[_Tool]) -> list[_Tool]:
    """The tools for a format that marks no end of arguments: any of them are an object."""
    return [replace(tool, schema=tool.schema or {"type": "object"}) for tool in tools]


def _array(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
    one = f"({_any_of([_object(build, tool, '') for tool in tools])})"
    more = f'(SPACE? "," SPACE? {one})*' if is_parallel else ""
    return f'"[" SPACE? {one} {more} SPACE? "]"'


def _write_granite(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
    return f"SPACE? {_array(build, _with_end(tools), is_parallel)}"


def _write_mistral(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
    """An array, as older models write it, or a name and its arguments."""
    tools = _with_end(tools)
    several = _array(build, tools, is_parallel)
    call_id = f"({build.literal('[CALL_ID]')} /[0-9A-Za-z]{{1,32}}/)?"
    named = [f"{quoted(tool.name)} {call_id} {build.literal('[ARGS]')}? {build.arguments(tool, '')}" for tool in tools]
    return f"SPACE? ({_any_of([several, *named])})"


def _write_deepseek_v3(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
    calls = []
    for tool in tools:
        header = build.literal(f"function<｜tool▁sep｜>{tool.name}\n```json\n")
        calls.append(f"{header} {build.arguments(tool, '<｜tool▁call▁end｜>', fence='```')}")
    return _any_of(calls)


def _write_deepseek_v31(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
    return _any_of(
        [f"{build.literal(tool.name + '<｜tool▁sep｜>')} {build.arguments(tool, '<｜tool▁call▁end｜>')}" for tool in tools]
    )


def _write_kimi_k2(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
    calls = []
    for tool in tools:
        header = f"{quoted(f'functions.{tool.name}:')} /[0-9]{{1,4}}/ SPACE? {build.literal('<|tool_call_argument_begin|>')}"
        calls.append(f"{header} {build.arguments(tool, '<|tool_call_end|>')}")
    return f"SPACE? ({_any_of(calls)})"


def _write_tagged(
    name_end: str, before_key: str, after_key: str, value_end: str, call_end: str, inner: Sequence[str] = ()
) -> Callable[[CallGrammar, Sequence[_Tool], bool], str]:
    """Calls that name each argument: the texts round keys and values, and what ends a call."""

    def write(build: CallGrammar, tools: Sequence[_Tool], is_parallel: bool) -> str:
        calls = []
        for tool in tools:
            if tool.schema is None:
                calls.append(f"{build.literal(tool.name + name_end.rstrip())} {build.until(call_end, inner=inner)}")
            else:
                pairs = build.bare_arguments(tool, before_key, after_key, value_end)
                calls.append(f"{build.literal(tool.name + name_end)} {pairs} {build.literal(call_end)}")
        return _any_of(calls)

    return write


@dataclass(frozen=True, slots=True)
class _Form:
    """A format: what begins a call, what stands behind that, and marks round calls that may stand in free text."""

    trigger: str
    write: _Write
    loose: tuple[str, ...] = ()


_GLM_INNER: Final = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_DEEPSEEK_LOOSE: Final = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_FORMATS: Final[Mapping[str, _Form]] = MappingProxyType(
    {
        "deepseek_v3": _Form("<｜tool▁call▁begin｜>", _write_deepseek_v3, _DEEPSEEK_LOOSE),
        "deepseek_v31": _Form("<｜tool▁call▁begin｜>", _write_deepseek_v31, _DEEPSEEK_LOOSE),
        "glm": _Form(
            "<tool_call>", _write_tagged("\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "</tool_call>", _GLM_INNER)
        ),
        "granite": _Form("<|tool_call|>", _write_granite),
        "hermes": _Form("<tool_call>", _write_hermes),
        "kimi_k2": _Form("<|tool_call_begin|>", _write_kimi_k2, ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")),
        "minimax": _Form(
            '<invoke name="',
            _write_tagged('">\n', '<parameter name="', '">', "</parameter>", "</invoke>"),
            ("<minimax:tool_call>", "</minimax:tool_call>"),
        ),
        "mistral": _Form("[TOOL_CALLS]", _write_mistral),
        "qwen3_coder": _Form(
            "<function=",
            _write_tagged(">\n", "<parameter=", ">\n", "\n</parameter>", "</function>"),
            ("<tool_call>", "</tool_call>"),
        ),
    }
)
