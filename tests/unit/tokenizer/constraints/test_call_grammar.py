"""Free text with right calls in each model's own format, and reasoning before it: what such grammars allow and what they refuse.

Each format is tried over two vocabularies of single bytes: in one its marks are text, in the other they are special tokens.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

from headrace.errors import InvalidRequestError
from headrace.grammars import Matcher, Vocabulary, compile_grammar, load_vocabulary
from headrace.output_formats import REASONING_FORMATS, TOOL_FORMATS
from services.detokenizer.parsers.output_parser import OutputParser, ReadingOptions
from services.tokenizer.constraints.reasoning_first import Block
from services.tokenizer.constraints.sources import ModelText, grammar_of

WEATHER: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema#",
    "title": "Weather",
    "description": "Tells the weather.",
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where.", "examples": ["Paris"], "x-order": 1},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C", "title": "Unit", "nullable": False},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "at": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
        "note": {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}]},
        "zone": {"$ref": "#/$defs/zone"},
        "kind": {"enum": ["12", "true", None]},
    },
    "$defs": {
        "place": {"type": "array", "items": {"type": "number"}},
        "zone": {"type": ["string", "null"], "minLength": 2, "description": "A zone."},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Final[list[dict[str, Any]]] = [
    {"name": "get_weather", "parameters": WEATHER, "is_strict": True},
    {"name": "get", "parameters": None, "is_strict": True},
    {"name": "log", "parameters": None, "is_strict": False},
]
ARGUMENTS: Final = '{"city": "Zürich <b>", "days": 3}'
FULL: Final = '{"city":"a","unit":"F","days":14,"at":[1.5],"note":"12","zone":"{}","kind":"true"}'
NULLS: Final = '{"city":"null","days":1,"at":null,"note":null,"zone":null,"kind":null}'
WRONG: Final = ('{"city": 3, "days": 3}', '{"city": "a", "days": 15}', '{"days": 3}', '{"city": "a", "days": 3, "x": 1}', "{}")


@dataclass(frozen=True)
class Form:
    """How a format is written: a call of JSON arguments, or with `write`, which knows only those of get_weather."""

    call: str
    marks: tuple[str, ...]
    broken: tuple[str, ...]
    write: Callable[[dict[str, Any]], str] | None = None
    lead: str = ""
    tail: str = ""

    def of(self, name: str, arguments: str) -> str:
        if self.write is None:
            return self.call.replace("@NAME@", name).replace("@ARGS@", arguments)
        return self.call.replace("@NAME@", name).replace("@ARGS@", self.write(json.loads(arguments)))


def _tagged(pattern: str) -> Callable[[dict[str, Any]], str]:
    def write(arguments: dict[str, Any]) -> str:
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        return "".join(pattern.replace("KEY", key).replace("VALUE", value) for key, value in values.items())

    return write


_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
FORMS: Final = {
    "hermes": Form(
        '<tool_call>\n{"name": "@NAME@", "arguments": @ARGS@}\n</tool_call>',
        ("<tool_call>", "</tool_call>"),
        ("<tool_call>x", '<tool_call>{"arguments": {}}</tool_call>'),
    ),
    "qwen3_coder": Form(
        "<tool_call>\n<function=@NAME@>\n@ARGS@</function>\n</tool_call>",
        ("<tool_call>", "</tool_call>"),
        ("<function=get_weather>x", "<function=get_weather><parameter=days>\n3\n</parameter>\n</function>"),
        _tagged("<parameter=KEY>\nVALUE\n</parameter>\n"),
    ),
    "minimax": Form(
        '<minimax:tool_call>\n<invoke name="@NAME@">\n@ARGS@</invoke>\n</minimax:tool_call>',
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        ('<invoke name="get_weather">\n<parameter name="days">',),
        _tagged('<parameter name="KEY">VALUE</parameter>\n'),
    ),
    "glm": Form(
        "<tool_call>@NAME@\n@ARGS@</tool_call>",
        ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        ("<tool_call>get_weather\n</tool_call>",),
        _tagged("<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n"),
    ),
    "deepseek_v3": Form(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>@NAME@\n```json\n@ARGS@\n```<｜tool▁call▁end｜>",
        _DEEPSEEK,
        ("<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>",),
        lead="<｜tool▁calls▁begin｜>",
        tail="<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": Form(
        "<｜tool▁call▁begin｜>@NAME@<｜tool▁sep｜>@ARGS@<｜tool▁call▁end｜>",
        _DEEPSEEK,
        ("<｜tool▁call▁begin｜><｜tool▁sep｜>",),
        lead="<｜tool▁calls▁begin｜>",
        tail="<｜tool▁calls▁end｜>",
    ),
    "kimi_k2": Form(
        "<|tool_call_begin|>functions.@NAME@:0<|tool_call_argument_begin|>@ARGS@<|tool_call_end|>",
        (
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_end|>",
            "<|tool_call_argument_begin|>",
        ),
        ("<|tool_call_begin|>get_weather:0", "<|tool_call_begin|>functions.get_weather:x"),
        lead="<|tool_calls_section_begin|>",
        tail="<|tool_calls_section_end|>",
    ),
    "granite": Form(
        '<|tool_call|>[{"name": "@NAME@", "arguments": @ARGS@}]',
        ("<|tool_call|>",),
        ("<|tool_call|>x", "<|tool_call|>[]", '<|tool_call|>{"name": "get"'),
    ),
    "mistral": Form(
        "[TOOL_CALLS]@NAME@[ARGS]@ARGS@",
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        ("[TOOL_CALLS]x", "[TOOL_CALLS][]"),
    ),
}  # fmt: skip


class Model:
    """A vocabulary of bytes, in which some texts are special tokens."""

    def __init__(self, directory: Path, special: tuple[str, ...]) -> None:
        path = directory / "tokenizer.json"
        made = json.loads(path.read_text(encoding="utf-8"))
        like = made["added_tokens"][0]
        self.ids = {"<s>": 256, "</s>": 257, **{text: 258 + index for index, text in enumerate(special)}}
        made["added_tokens"] = [{**like, "id": number, "content": text} for text, number in self.ids.items()]
        path.write_text(json.dumps(made), encoding="utf-8")
        self.vocabulary: Vocabulary = load_vocabulary(directory, vocab_size=280, eos_token_ids=(257,))
        self._compiled: dict[str, Matcher] = {}

    def grammar(self, kind: str, source: object, tool_format: str, block: Block | None = None) -> str:
        text = source if isinstance(source, str) else json.dumps(source)
        model = ModelText(self.ids, tool_format, block)
        return grammar_of(kind, text, param="tools", vocabulary=self.vocabulary, model=model)

    def allows(self, grammar: str, output: str, *, is_whole: bool = True) -> bool:
        """Whether an output is allowed; with `is_whole`, whether it may end there."""
        if grammar not in self._compiled:
            self._compiled[grammar] = compile_grammar(self.vocabulary, grammar)
        matcher = self._compiled[grammar].deep_copy()
        marks = "|".join(re.escape(text) for text in self.ids)
        tokens: list[int] = []
        for part in re.split(f"({marks})", output):
            tokens += [self.ids[part]] if part in self.ids else self.vocabulary.greedy_tokenize(part)
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and (not is_whole or matcher.is_accepting()))


@pytest.fixture(params=["text", "special"])
def model(request: pytest.FixtureRequest, model_directory: Path, tool_format: str) -> Model:
    return Model(model_directory, FORMS[tool_format].marks if request.param == "special" else ())


def strict(tools: list[dict[str, Any]] = TOOLS, *, is_parallel: bool = True) -> dict[str, Any]:
    return {"tools": tools, "is_parallel": is_parallel}


@pytest.mark.parametrize("tool_format", FORMS)
def test_text_is_free_and_calls_are_right(model: Model, tool_format: str) -> None:
    form, grammar = FORMS[tool_format], model.grammar("tool_calls", strict(), tool_format)
    good = form.of("get_weather", ARGUMENTS)
    section = form.lead + good + form.tail
    free = ("", "Hello, {w} <b>[1]</b>\n```json\n{}\n```", "<tool_cal", "get_weather(city=1)")
    calls = (
        good,
        f"Let me see.\n{good}",
        f"{section}",
        f"{good}\n{form.of('get_weather', FULL)}",
        form.of("get_weather", NULLS),
        form.of("get", "{}"),
    )
    for output in (*free, *calls):
        assert model.allows(grammar, output), output
    # As bare text a number is a string too.
    wrong = WRONG if form.write is None else WRONG[1:]
    for output in (*(form.of("get_weather", arguments) for arguments in wrong), form.of("nope", "{}"), *form.broken):
        for before in ("", "Text. ", good):
            assert not model.allows(grammar, before + output, is_whole=False), before + output


@pytest.mark.parametrize("tool_format", FORMS)
def test_arguments_of_a_tool_that_is_not_strict_are_free(model: Model, tool_format: str) -> None:
    form, grammar = FORMS[tool_format], model.grammar("tool_calls", strict(), tool_format)
    for arguments in ('{"anything": "goes"}', "{}"):
        call = form.of("log", arguments)
        assert model.allows(grammar, f"{call} and {form.of('get_weather', ARGUMENTS)}"), call
        assert not model.allows(grammar, call + form.of("get_weather", "{}"), is_whole=False)


@pytest.mark.parametrize("tool_format", [name for name, form in FORMS.items() if form.write is None])
def test_arguments_are_an_object_whether_the_schema_says_so_or_not(model: Model, tool_format: str) -> None:
    tool = {"name": "get", "parameters": {"properties": {"a": {"type": "integer"}}}, "is_strict": True}
    form, grammar = FORMS[tool_format], model.grammar("tool_calls", strict([tool]), tool_format)
    assert model.allows(grammar, form.of("get", '{"a": 1}'))
    for wrong in ("1", '"text"', "[]", "null", '{"a": "b"}'):
        assert not model.allows(grammar, form.of("get", wrong), is_whole=False), wrong


@pytest.mark.parametrize("tool_format", FORMS)
def test_one_call_where_several_are_not_wanted(model: Model, tool_format: str) -> None:
    form, grammar = FORMS[tool_format], model.grammar("tool_calls", strict(is_parallel=False), tool_format)
    call = form.of("get_weather", ARGUMENTS)
    one = call.removesuffix("\n</tool_call>") if tool_format == "qwen3_coder" else call.removesuffix("\n</minimax:tool_call>")
    assert model.allows(grammar, "Text.")
    assert model.allows(grammar, f"Text. {one}")
    assert not model.allows(grammar, one + one, is_whole=False)


@pytest.mark.parametrize("tool_format", ["mistral"])
def test_mistral_may_write_an_array(model: Model, tool_format: str) -> None:
    grammar = model.grammar("tool_calls", strict(), tool_format)
    one, other = (f'{{"name": "get_weather", "arguments": {arguments}}}' for arguments in (ARGUMENTS, FULL))
    assert model.allows(grammar, f"[TOOL_CALLS][{one}, {other}]")
    assert model.allows(grammar, f"[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{ARGUMENTS}")
    assert not model.allows(grammar, '[TOOL_CALLS][{"name": "nope"', is_whole=False)
    single = model.grammar("tool_calls", strict(is_parallel=False), tool_format)
    assert not model.allows(single, f"[TOOL_CALLS][{one}, ", is_whole=False)


@pytest.mark.parametrize("tool_format", ["qwen3_coder"])
def test_bare_strings_have_their_lengths_and_values(model: Model, tool_format: str) -> None:
    properties = {
        "s": {"type": "string", "minLength": 2, "maxLength": 4},
        "c": {"const": "x y", "type": "string"},
        "e": {"enum": ["a", 1]},
        "n": {"type": "string", "minLength": 2},
        "m": {"type": "string", "maxLength": 2},
        "o": {"type": "string", "enum": ["a", "abc", "\nb", ""], "minLength": 1, "maxLength": 2},
    }
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties}, "is_strict": True}
    grammar, write = model.grammar("tool_calls", strict([tool]), tool_format), FORMS[tool_format].write
    assert write is not None
    for arguments, is_right in (
        ({"s": "ab"}, True), ({"s": "abcd", "c": "x y"}, True), ({"s": "a"}, False), ({"s": "abcde"}, False), ({"c": "z"}, False),
        ({}, True), ({"n": "ab cd\ne"}, True), ({"n": "a"}, False), ({"n": "a\n"}, False), ({"m": ""}, True), ({"m": "abc"}, False),
        ({"o": "a"}, True), ({"o": "abc"}, False), ({"o": "\nb"}, False),
    ):  # fmt: skip
        call = f"<function=f>\n{write(arguments)}</function>"
        assert model.allows(grammar, call, is_whole=False) is is_right, call
    assert model.allows(grammar, '<function=f>\n<parameter=e>\n"a"\n</parameter>\n</function>')


@pytest.mark.parametrize("tool_format", ["qwen3_coder"])
def test_bare_strings_may_be_null_where_the_schema_says_so(model: Model, tool_format: str) -> None:
    two = {"anyOf": [{"type": "string", "minLength": 5}, {"enum": ["a.b", "</parameter>"]}, {"type": "null"}]}
    properties = {
        "l": {"type": ["string", "null"], "minLength": 5},
        "o": {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
        "a": {"allOf": [{"$ref": "#/$defs/two"}]},
        "e": {"enum": ["x", None, "</parameter>"]},
        "s": {"type": "string", "minLength": 5},
        "f": False,
    }
    parameters = {"type": "object", "properties": properties, "$defs": {"two": two}}
    tool = {"name": "f", "parameters": parameters, "is_strict": True}
    grammar, write = model.grammar("tool_calls", strict([tool]), tool_format), FORMS[tool_format].write
    assert write is not None
    for arguments, is_right in (
        ({"l": "null"}, True), ({"l": "nulls"}, True), ({"l": "nul"}, False), ({"o": "ab"}, True), ({"o": "null"}, True),
        ({"o": "nul"}, False), ({"a": "a.b"}, True), ({"a": "a-b"}, False), ({"a": "null"}, True), ({"a": "12345"}, True),
        ({"e": "x"}, True), ({"e": "null"}, True), ({"e": '"x"'}, False), ({"e": "</parameter>"}, False), ({"s": "null"}, False),
        ({"s": "text</parameter>"}, False), ({"f": "null"}, False),
    ):  # fmt: skip
        call = f"<function=f>\n{write(arguments)}</function>"
        assert model.allows(grammar, call, is_whole=False) is is_right, call


@pytest.mark.parametrize(
    ("tool_format", "schema", "place"),
    [
        ("hermes", {"properties": {"a": {"not": {}}}}, "the strict tools at #/tools/1/parameters/properties/a/not: not cannot"),
        ("hermes", {"properties": {"a": {"type": "strin"}}}, "at #/tools/1/parameters/properties/a: Invalid type"),
        ("glm", {"properties": {"a": {"type": "string", "pattern": "b"}}}, "properties/a/pattern: cannot be enforced for a strict"),
        (
            "glm",
            {
                "properties": {"a": {"$ref": "#/$defs/d"}},
                "$defs": {"d": {"anyOf": [{"type": "null"}, {"const": "a", "format": "date"}]}},
            },
            "#/tools/1/parameters/$defs/d/anyOf/1/format: cannot be enforced for a strict",
        ),
        (
            "glm",
            {"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}}},
            "properties/a/oneOf: alternatives of oneOf that may overlap",
        ),
        ("glm", {"properties": {"a": False}, "required": ["a"]}, "properties/a: false allows nothing"),
        ("glm", {"anyOf": [{"type": "object"}]}, "at #/tools/1/parameters/anyOf: cannot be enforced for a strict tool"),
        ("glm", {"properties": {"<a>": {}}}, "parameters/properties/<a>: is no name that this model can write"),
        ("glm", {"properties": {}, "required": ["b"]}, "parameters/required: must name properties only; got 'b'"),
        ("glm", {"properties": {"a": {"type": "string", "enum": [1]}}}, "properties/a: allows no string that this model can write"),
    ],
)
def test_a_strict_schema_that_cannot_be_enforced_is_refused(
    model_directory: Path, tool_format: str, schema: Any, place: str
) -> None:
    tools = [TOOLS[1], {"name": "f", "parameters": {"type": "object", **schema}, "is_strict": True}]
    with pytest.raises(InvalidRequestError) as refused:
        Model(model_directory, ()).grammar("tool_calls", strict(tools), tool_format)
    assert place in refused.value.message
    assert refused.value.param == "tools"


@pytest.mark.parametrize("tool_format", ["", *sorted(set(TOOL_FORMATS) - set(FORMS))])
def test_formats_without_a_mark_have_no_grammar(model_directory: Path, tool_format: str) -> None:
    assert tool_format in ("", "gpt_oss", "json", "llama3_json", "pythonic")
    assert Model(model_directory, ()).grammar("tool_calls", strict(), tool_format) == ""


BLOCKS: Final = sorted({(form.opening, form.closing) for name, form in REASONING_FORMATS.items() if name != "gpt_oss"})
BAD: Final = '<tool_call>{"name": "nope", "arguments": {}}</tool_call>'
GOOD: Final = FORMS["hermes"].of("get_weather", ARGUMENTS)
SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("specials", ["none", "both", "opening", "closing"])
@pytest.mark.parametrize("marks", BLOCKS)
def test_reasoning_may_come_before_whatever_is_enforced(model_directory: Path, marks: tuple[str, str], specials: str) -> None:
    """Inside the block nothing is enforced, behind its first end all is; where the prompt opened it, it must end."""
    opening, closing = marks
    special = {"none": (), "both": marks, "opening": marks[:1], "closing": marks[1:]}[specials]
    model = Model(model_directory, special)
    tag = {
        "format": {
            "type": "triggered_tags",
            "triggers": ["<n>"],
            "tags": [{"begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]"}}],
        }
    }
    for kind, source, right, wrong in (
        ("tool_calls", strict(), (GOOD, "Hi.", f"Hi.\n{GOOD}"), (BAD, f"Hi. {BAD}")),
        ("json_schema", SCHEMA, ('{"a": 1}',), ('{"a": "b"}', "Hi.")),
        ("json_object", "", ('{"a": "b"}',), ("[",)),
        ("regex", "[0-9]+", ("12",), ("x",)),
        ("choice", ["yes", "no"], ("no",), ("nx",)),
        ("ebnf", 'start: "(" start ")" | "x"', ("((x))",), ("(y",)),
        ("structural_tag", tag, ("Hi.<n>1", "Hi."), ("<n>x", "Hi.<n>x")),
    ):  # fmt: skip
        thoughts = f"Shall I? {BAD} <n>x {{}} no.\n"
        inside = model.grammar(kind, source, "hermes", Block(opening, closing, is_open=True))
        free = model.grammar(kind, source, "hermes", Block(opening, closing, is_open=False))
        for space in ("", "\n\n"):
            for output in right:
                assert model.allows(inside, f"{thoughts}{closing}{space}{output}"), (kind, output)
                assert model.allows(free, f"{space}{opening}{thoughts}{closing}{space}{output}"), (kind, output)
                assert model.allows(free, output), (kind, output)
            for output in wrong:
                assert not model.allows(inside, f"{thoughts}{closing}{space}{output}", is_whole=False), (kind, output)
                assert not model.allows(free, f"{opening}{thoughts}{closing}{space}{output}", is_whole=False), (kind, output)
                assert not model.allows(free, output, is_whole=False), (kind, output)
        assert model.allows(inside, thoughts, is_whole=False)
        assert not model.allows(inside, thoughts)
        assert not model.allows(free, opening + thoughts)


def _mutated(text: str, choose: random.Random) -> str:
    """A text with a part of it taken away, doubled, or replaced by a character of its own or a short piece of another place."""
    start = choose.randrange(len(text))
    end = min(len(text), start + choose.choice((0, 1, 1, 2, 5, 20)))
    other = choose.randrange(len(text))
    piece = choose.choice(("", text[other], text[other : other + 8], text[start:end] * 2, "\n", " ", '"', "3"))
    return text[:start] + piece + text[end:]


@pytest.mark.parametrize("tool_format", FORMS)
def test_what_a_grammar_allows_is_read_as_calls_that_fit(model: Model, tool_format: str) -> None:
    """Goal: grammars and the parsers of the detokenizer mean the same. Method: right outputs, changed a little at random; of those
    that the grammar allows every strict call that is read must fit its schema."""
    form, grammar = FORMS[tool_format], model.grammar("tool_calls", strict(), tool_format)
    functions = [{"function": {"name": tool["name"], "parameters": tool["parameters"]}} for tool in TOOLS]
    options = ReadingOptions(tool_format=tool_format, tools=json.dumps(functions))
    choose, validator = random.Random(tool_format), jsonschema.Draft202012Validator(WEATHER)
    num_allowed = num_calls = 0
    for _ in range(200):
        output = f"Hi. {form.lead}{form.of('get_weather', choose.choice((ARGUMENTS, FULL, NULLS)))}{form.tail} Bye."
        for _ in range(choose.choice((0, 1, 1, 2))):
            output = _mutated(output, choose)
        if not model.allows(grammar, output):
            continue
        num_allowed += 1
        parser = OutputParser(options)
        parser.push(output)
        parser.finish()
        _, _, parts = parser.take()
        calls: dict[int, list[str]] = {}
        for part in parts:
            calls.setdefault(part.index, [part.name, ""])[1] += part.arguments
        for name, arguments in calls.values():
            if name == "get_weather":
                num_calls += 1
                validator.validate(json.loads(arguments))
    assert num_allowed > 40
    assert num_calls > 20
