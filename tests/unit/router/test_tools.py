"""Tools of a request: limits, the grammar of required calls, ids."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from headrace.errors import InvalidRequestError
from services.router.generation import (
    TOOL_CALLS_KIND,
    ChatTurn,
    Constraint,
    ConversationPrompt,
    GenerationRequest,
    TextPrompt,
    Tool,
    ToolCallDelta,
    ToolChoice,
)
from services.router.tools import MAX_TOOLS, with_checked_tools, with_ids

WEATHER = Tool(
    "get_weather",
    "Tells the weather.",
    {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/Place"}, "next": {"$ref": "#"}},
        "required": ["place"],
        "$defs": {"Place": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
)
NOW = Tool("now")


def request(*tools: Tool, choice: ToolChoice | None = None, **fields: Any) -> GenerationRequest:
    prompt = ConversationPrompt((ChatTurn("user", "hi"),), tools=tools)
    return GenerationRequest("m", prompt, tool_choice=choice or ToolChoice(), **fields)


def schema_of(checked: GenerationRequest) -> Any:
    assert checked.constraint is not None
    assert (checked.constraint.kind, checked.constraint.param) == ("json_schema", "tools")
    return json.loads(checked.constraint.source)


def test_auto_and_none_need_no_grammar() -> None:
    assert with_checked_tools(request(WEATHER)).constraint is None
    assert with_checked_tools(request(WEATHER, choice=ToolChoice("none"))).constraint is None
    assert with_checked_tools(GenerationRequest("m", TextPrompt("a"))).constraint is None


def test_strict_tools_make_a_grammar_under_auto_and_only_there() -> None:
    strict = replace(WEATHER, is_strict=True)
    checked = with_checked_tools(request(strict, replace(NOW, parameters={}), parallel_tool_calls=False))
    assert checked.constraint is not None
    assert (checked.constraint.kind, checked.constraint.param) == (TOOL_CALLS_KIND, "tools")
    assert json.loads(checked.constraint.source) == {
        "tools": [
            {"name": "get_weather", "parameters": WEATHER.parameters, "is_strict": True},
            {"name": "now", "parameters": None, "is_strict": False},
        ],
        "is_parallel": False,
    }
    given = Constraint("json_object")
    assert with_checked_tools(request(strict, constraint=given)).constraint is given
    assert with_checked_tools(request(strict, choice=ToolChoice("none"))).constraint is None
    assert schema_of(with_checked_tools(request(strict, choice=ToolChoice("required"))))["type"] == "array"


def test_required_is_an_array_of_calls_of_any_tool() -> None:
    schema = schema_of(with_checked_tools(request(WEATHER, NOW, choice=ToolChoice("required"))))
    names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
    assert (schema["type"], schema["minItems"], schema["maxItems"], names) == ("array", 1, 8, ["get_weather", "now"])


def test_arguments_are_an_object_whether_their_schema_says_so_or_not() -> None:
    parameters = {"properties": {"a": {}}}
    forced = with_checked_tools(request(replace(NOW, parameters=parameters), choice=ToolChoice("required")))
    assert schema_of(forced)["$defs"]["now"] == {"type": "object", **parameters}
    for empty in (None, {}):
        forced = with_checked_tools(request(replace(NOW, parameters=empty), choice=ToolChoice("required")))
        assert schema_of(forced)["$defs"]["now"]["type"] == "object"


def test_references_inside_a_tool_follow_it() -> None:
    definition = schema_of(with_checked_tools(request(WEATHER, choice=ToolChoice("required"))))["$defs"]["get_weather"]
    assert definition["properties"] == {
        "place": {"$ref": "#/$defs/get_weather/$defs/Place"},
        "next": {"$ref": "#/$defs/get_weather"},
    }
    assert definition["$defs"] == WEATHER.parameters["$defs"]  # type: ignore[index]


def test_a_named_tool_is_the_only_one_and_one_call_means_one() -> None:
    schema = schema_of(with_checked_tools(request(WEATHER, NOW, choice=ToolChoice("named", "now"), parallel_tool_calls=False)))
    assert schema["items"]["properties"]["name"] == {"const": "now"}
    assert schema["maxItems"] == 1
    assert list(schema["$defs"]) == ["now"]


@pytest.mark.parametrize(
    ("refused", "param", "message"),
    [
        (request(NOW, choice=ToolChoice("named", "rm")), "tool_choice", "the function 'rm' is not among the tools"),
        (request(choice=ToolChoice("named", "rm")), "tool_choice", "'rm'"),
        (request(choice=ToolChoice("required")), "tool_choice", "needs tools"),
        (
            request(NOW, choice=ToolChoice("required"), constraint=Constraint("regex", "a", "structured_outputs")),
            "tool_choice",
            "structured_outputs",
        ),
        (request(NOW, NOW), "tools.1.name", "a name of its own"),
        (request(Tool("a b")), "tools.0.name", "1 to 64 letters"),
        (request(Tool("")), "tools.0.name", "1 to 64 letters"),
        (request(Tool("a" * 65)), "tools.0.name", "1 to 64 letters"),
        (request(Tool("a", "x" * 70_000)), "tools.0", "at most 65536 bytes"),
        (request(Tool("a", "", {"type": "string"})), "tools.0.parameters.type", "object"),
        (request(*(Tool(f"f{index}") for index in range(MAX_TOOLS + 1))), "tools", "at most 128"),
    ],
)
def test_a_refusal_names_field_and_limit(refused: GenerationRequest, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        with_checked_tools(refused)
    assert caught.value.param == param


def test_schemas_have_a_depth() -> None:
    schema: dict[str, Any] = {}
    for _ in range(40):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidRequestError, match="32 deep"):
        with_checked_tools(request(Tool("a", "", schema)))


def test_ids_are_given_once_and_always_the_same() -> None:
    parts = (ToolCallDelta(0, "{", "", "now"), ToolCallDelta(0, "}"), ToolCallDelta(1, "", "functions.now:1", "now"))
    first, rest, own = with_ids(parts, "r", "hermes")
    assert first.id.startswith("call_")
    assert len(first.id) == 29
    assert (rest.id, own.id) == ("", "functions.now:1")
    assert with_ids(parts[:1], "r", "hermes")[0].id == first.id
    assert with_ids(parts[:1], "r2", "hermes")[0].id != first.id
    mistral = with_ids(parts[:1], "r", "mistral")[0].id
    assert mistral.isalnum()
    assert len(mistral) == 9
