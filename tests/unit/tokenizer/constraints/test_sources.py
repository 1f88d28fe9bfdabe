"""Constraints of every kind, compiled over a tokenizer of single bytes: what they allow, and how what is wrong is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.errors import InvalidRequestError
from headrace.grammars import Vocabulary, compile_grammar, load_vocabulary
from services.tokenizer.constraints.sources import MAX_CHOICES, ModelText, grammar_of

MODEL = ModelText({"<s>": 256, "</s>": 257})


@pytest.fixture
def vocabulary(model_directory: Path) -> Vocabulary:
    return load_vocabulary(model_directory, vocab_size=260, eos_token_ids=(257,))


def _grammar(vocabulary: Vocabulary, kind: str, source: object) -> str:
    text = source if isinstance(source, str) else json.dumps(source)
    return grammar_of(kind, text, param="response_format", vocabulary=vocabulary, model=MODEL)


def _is_allowed(vocabulary: Vocabulary, grammar: str, output: str) -> bool:
    """Whether a whole output matches; `<s>` in it stands for that token."""
    matcher = compile_grammar(vocabulary, grammar)
    tokens: list[int] = []
    for index, part in enumerate(output.split("<s>")):
        tokens += ([256] if index else []) + vocabulary.greedy_tokenize(part)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def _tags(*elements: object, kind: str = "sequence") -> dict[str, object]:
    return {"type": kind, "elements": list(elements)}


def _const(value: str) -> dict[str, object]:
    return {"type": "const_string", "value": value}


def _tag(begin: str, end: str = "", **content: object) -> dict[str, object]:
    return {"type": "tag", "begin": begin, "content": content or {"type": "any_text"}, "end": end}


ANY_TEXT = {"type": "any_text"}
NUMBER = {"type": "regex", "pattern": "[0-9]+"}
MAY_CALL = {"type": "triggered_tags", "triggers": ["<"], "tags": [_tag("<a>", "</a>", **NUMBER)]}
CALLS_ONCE = {**MAY_CALL, "stop_after_first": True, "at_least_one": True}
ADDRESS = {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}, "required": ["zip"]}
TAGS = {"structures": [{"begin": "<f=a>", "schema": ADDRESS, "end": "</f>"}], "triggers": ["<f="]}
THINK = {
    "type": "sequence",
    "elements": [
        {"type": "any_text"},
        {"type": "const_string", "value": "</think>"},
        {"type": "json_schema", "json_schema": {"type": "integer"}},
    ],
}


@pytest.mark.parametrize(
    ("kind", "source", "allowed", "refused"),
    [
        ("json_object", "", ['{"a": [1]}', "{}"], ["[]", "1", '{"a": }', "{"]),
        ("json_schema", ADDRESS, ['{"zip": "01234"}', '{ \n"zip":"01234", "b": 1}'], ['{"zip": "1"}', "{}", '{"zip":"01234"} ']),
        ("json_schema", "true", ["1", '"ü"'], ["x"]),
        ("json_schema", {"type": "object"}, ['{"a":' + " " * 40 + "1}"], ['{"a":' + " " * 41 + "1}"]),
        (
            "json_schema",
            {"$schema": "https://json-schema.org/draft-07/schema#", "type": "integer", "minimum": 3, "exclusiveMinimum": True},
            ["4"],
            ["3"],
        ),
        ("json_schema", {"$ref": "#/components/a~1b/0", "components": {"a/b": [{"type": "integer"}]}}, ["4"], ['"4"']),
        ("regex", "^a+/b$", ["aa/b"], ["a/b\n", "xa/b", "aa/"]),
        ("regex", r"a\$", ["a$"], ["a"]),
        ("regex", "a|bc", ["a", "bc"], ["ac", "b"]),
        ("choice", ['say "ü"', "no\n", "/x/"], ['say "ü"', "no\n", "/x/"], ["no", "say"]),
        ("ebnf", 'root ::= "(" root ")" | [0-9]+', ["((12))"], ["((1)", "()"]),
        ("ebnf", 'start: "(" start ")" | N\nN: /[0-9]+/', ["((12))"], ["((1)"]),
        ("ebnf", '?start: "(" start ")" | N\nN: /[0-9]+/', ["((12))"], ["((1)"]),
        ("ebnf", '// ::=\n  !start : n\n?n: "::=" | "b"', ["::=", "b"], ["c"]),
        ("ebnf", 'root ::= begin\nbegin ::= "start:" | "?start: x"', ["start:", "?start: x"], ["x"]),
        ("structural_tag", TAGS, ["hi", 'hi <f=a>{"zip":"01234"}</f> and on'], ["<f=b>", '<f=a>{"zip":1}</f>']),
        ("structural_tag", {"format": THINK}, ["well </think>12", "</think>3"], ["12", "</think>x"]),
        (
            "structural_tag",
            {"format": {"type": "tag", "begin": "<s>", "content": THINK["elements"][2], "end": "!"}},
            ["<s>7!"],
            ["7!"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    "type": "tags_with_separator",
                    "tags": [{"begin": "[", "content": {"type": "regex", "pattern": "[0-9]"}, "end": "]"}],
                    "separator": ",",
                    "at_least_one": True,
                }
            },
            ["[1]", "[1],[2]"],
            ["", "[1],", "[a]"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["<"],
                    "tags": [{"begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}],
                    "at_least_one": True,
                    "stop_after_first": True,
                }
            },
            ["x<a>y</a>"],
            ["x", "x<a>y</a>z", "x<b>"],
        ),
        (
            "structural_tag",
            {"format": _tags(ANY_TEXT, _tag("<a>", "</a>", **NUMBER), _const("."))},
            ["x<a>1</a>.", "<a>12</a>.", "<b><a>1</a>."],
            ["x", "x<a>b</a>.", "x<a>1</a>", "x<a>1</a>.y"],
        ),
        (
            "structural_tag",
            {"format": _tags(ANY_TEXT, _tags(_const("<a>"), _const("<abc>"), _tag("<b", ">", **NUMBER), kind="or"), ANY_TEXT)},
            ["x<a>y", "<abc>", "x<b7>y<a>", "x<a<a>"],
            ["x", "x<b>", "x<ab>"],
        ),
        (
            "structural_tag",
            {"format": _tags(_tags(_const("-"), _tags(ANY_TEXT, _const("!"), kind="or")), _tags(_const("<s>"), NUMBER))},
            ["-x<s>1", "-<s>1", "-!<s>1", "-!!<s>1"],
            ["x<s>1", "-x<s>y", "-x"],
        ),
        (
            "structural_tag",
            {"format": _tags(_tags(_const("("), _tag("[", type="any_text"), kind="or"), _const("."), ANY_TEXT, _const("<s>x"))},
            ["(.<s>x", "[a.b<s>x", "[.b.<s>x"],
            ["(a.<s>x", "[a<s>x", "(.<s>y", "(.x"],
        ),
        (
            "structural_tag",
            {
                "format": _tags(
                    ANY_TEXT, _tags(_tag("<t>", type="any_text"), _tag("<n>", **NUMBER), kind="or"), _const("</t>"), NUMBER
                )
            },
            ["x<t>y</t>1", "<n>1</t>2"],
            ["x<t>y</t>", "x</t>1", "<n>x</t>1"],
        ),
        (
            "structural_tag",
            {"format": _tag("[", "]", **MAY_CALL)},
            ["[]", "[x]", "[x<a>1</a>y<a>2</a>]"],
            ["[x", "[<a>x</a>]", "[x<b>]", "[x]y"],
        ),
        (
            "structural_tag",
            {"format": _tags(MAY_CALL, _const("<end>"), NUMBER)},
            ["<end>1", "x<a>1</a>y<end>1"],
            ["x", "<end>x", "<a>x</a><end>1"],
        ),
        (
            "structural_tag",
            {"format": _tags(ANY_TEXT, _tags(_const("."), _tag("?", **CALLS_ONCE), kind="or"), NUMBER)},
            ["x.1", "x?y<a>1</a>2"],
            ["x?2", "x?<a>1</a>", "x.y"],
        ),
        (
            "structural_tag",
            {"format": _tags({**MAY_CALL, "stop_after_first": True}, _const("!"))},
            ["!", "x!", "x<a>1</a>!"],
            ["x", "<a>1</a>x!", "x<b>!"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    "type": "or",
                    "elements": [{"type": "const_string", "value": "a"}, {"type": "regex", "pattern": "/[0-9]"}],
                }
            },
            ["a", "/1"],
            ["b"],
        ),
    ],
)
def test_exactly_what_a_constraint_says_is_allowed(
    vocabulary: Vocabulary, kind: str, source: object, allowed: list[str], refused: list[str]
) -> None:
    grammar = _grammar(vocabulary, kind, source)
    assert [output for output in allowed if not _is_allowed(vocabulary, grammar, output)] == []
    assert [output for output in refused if _is_allowed(vocabulary, grammar, output)] == []


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", "{", "the schema at #: is not valid JSON"),
        ("json_schema", "[" * 50_000, "nested too deeply"),
        ("json_schema", {"properties": {"a": {"not": {}}}}, "the schema at #/properties/a/not: not cannot be enforced"),
        ("json_schema", {"properties": {"a": {"type": "strin"}}}, "the schema at #/properties/a: Invalid type: strin"),
        ("json_schema", {"$defs": {"x": {"type": "string", "pattern": "(?=a)"}}, "$ref": "#/$defs/x"}, "at #/$defs/x: regex"),
        ("json_schema", {"items": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "at #/items: alternatives of oneOf"),
        ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "at #: Unsatisfiable schema"),
        ("regex", "(", "the regular expression cannot be used"),
        ("regex", "", "it is empty"),
        ("choice", [], "the choice at #: must be an array of 1 to"),
        ("choice", ["a"] * (MAX_CHOICES + 1), "the choice at #: must be an array of 1 to"),
        ("choice", ["a", 3], "the choice at #/1: must be a non-empty string"),
        ("ebnf", "root ::= none", "neither GBNF nor Lark"),
        ("ebnf", "?start: none", 'unknown name: "none"'),
        ("ebnf", "start: none", "the grammar cannot be used"),
        ("structural_tag", {}, "the structural tag at #/structures: must be a non-empty array"),
        (
            "structural_tag",
            {"format": _tags(ANY_TEXT, NUMBER)},
            "at #/format/elements/1: begins with no fixed text, and stands behind",
        ),
        ("structural_tag", {"format": _tags(ANY_TEXT, ANY_TEXT)}, "at #/format/elements/1: begins with no fixed text"),
        ("structural_tag", {"format": _tags(ANY_TEXT, MAY_CALL)}, "at #/format/elements/1: begins with no fixed text"),
        (
            "structural_tag",
            {"format": _tags(_tag("<a>"), _tags(_const("b"), _tags(NUMBER), kind="or"))},
            "at #/format/elements/1/elements/1/elements/0: begins with no fixed text",
        ),
        ("structural_tag", {"format": {**MAY_CALL, "tags": [_tag("<a>")]}}, "at #/format/tags/0/end: must be a text"),
        (
            "structural_tag",
            {"format": {"type": "tags_with_separator", "separator": ",", "tags": [_tag("<a>")]}},
            "at #/format/tags/0/end: must be a text",
        ),
        (
            "structural_tag",
            {"format": _tags(_tags(), {"type": "or", "elements": 3})},
            "at #/format/elements/0/elements: must be a non-",
        ),
        (
            "structural_tag",
            {"format": _tags(_tag("a", type="or", elements=3), ANY_TEXT)},
            "0/content/elements: must be a non-empty",
        ),
        ("structural_tag", {"format": {"type": "x"}}, "at #/format/type: must be one of"),
        ("structural_tag", TAGS | {"triggers": ["<g"]}, "at #/tags/0/begin: must begin with one of the triggers"),
        ("structural_tag", {"format": {"type": "json_schema", "json_schema": {"not": {}}}}, "at #/format/json_schema/not:"),
        ("unknown", "", "not known here"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(vocabulary: Vocabulary, kind: str, source: object, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        _grammar(vocabulary, kind, source)
    assert message in refused.value.message
    assert refused.value.message.startswith("response_format: ")
    assert refused.value.param == "response_format"


def test_a_grammar_that_is_too_large_is_refused(vocabulary: Vocabulary) -> None:
    alternatives = " | ".join(f'"a{index}" "b" start' for index in range(40_000))
    with pytest.raises(InvalidRequestError, match=r"too (large|big)"):
        _grammar(vocabulary, "ebnf", f'start: "x" | {alternatives}')
