"""Tools and reasoning in OpenAI's chat: requests, answers whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace.errors import InvalidRequestError
from services.router.generation import (
    ConversationPrompt,
    OutputPiece,
    ReasoningOptions,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)
from services.router.http.openai import parse_chat, parse_tokenize
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.test_app import Client

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "It.", "parameters": PARAMETERS, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def parsed(**fields: Any) -> Any:
    return parse_chat(json.dumps({"messages": [USER], **fields}).encode()).generation


def test_tools_and_their_choice_are_taken() -> None:
    generation = parsed(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert generation.prompt.tools == (Tool("get_weather", "It.", PARAMETERS, is_strict=True), Tool("now"))
    assert (generation.tool_choice, generation.parallel_tool_calls) == (ToolChoice("required"), False)
    assert parsed(tools=TOOLS).tool_choice == ToolChoice("auto")
    named = parsed(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})
    assert named.tool_choice == ToolChoice("named", "now")


def test_turns_of_calls_and_results_are_taken() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm", "refusal": None, "name": "bot"},
        {"role": "tool", "content": [{"type": "text", "text": "12:00"}], "tool_call_id": "c1"},
        {"role": "assistant", "refusal": "I won't."},
    ]
    _, called, result, refused = parsed(messages=messages).prompt.turns
    assert (called.content, called.tool_calls, called.reasoning, called.name) == ("", (ToolCall("c1", "now", "{}"),), "hm", "bot")
    assert (result.role, result.content, result.tool_call_id) == ("tool", "12:00", "c1")
    assert refused.content == "I won't."


def test_reasoning_options_are_taken() -> None:
    generation = parsed(
        separate_reasoning=False,
        stream_reasoning=False,
        reasoning_budget_tokens=9,
        reasoning_effort="high",
        chat_template_kwargs={"enable_thinking": True},
    )
    assert generation.reasoning == ReasoningOptions(is_separate=False, is_streamed=False, budget_tokens=9)
    assert generation.prompt.template_kwargs == {"enable_thinking": True, "reasoning_effort": "high"}
    assert parsed(reasoning_effort="none").prompt.template_kwargs == {"enable_thinking": False}
    assert parsed().reasoning == ReasoningOptions()


def test_tokenize_takes_tools() -> None:
    call = parse_tokenize(json.dumps({"messages": [USER], "tools": TOOLS, "chat_template_kwargs": {"a": 1}}).encode())
    assert isinstance(call.prompt, ConversationPrompt)
    assert len(call.prompt.tools) == 2
    assert call.prompt.template_kwargs == {"a": 1}


def _assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"functions": [{"name": "f"}]}, "functions", "send the same functions as tools"),
        ({"function_call": {"name": "f"}}, "function_call", "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools.0.type", "'function'"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parametres": {}}}]},
            "tools.0.function.parametres",
            "parameters",
        ),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", '"none", "auto", "required"'),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'minimal'"),
        ({"reasoning_budget_tokens": 0}, "reasoning_budget_tokens", "[1, 2147483647]"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "template's own"),
        ({"chat_template_kwargs": {"a": "x" * 20_000}}, "chat_template_kwargs", "16384 bytes"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "required"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages.0.tool_calls", "role user"),
        (_assistant(), "messages.1.content", "unless tool_calls"),
        (_assistant(tool_calls={}), "messages.1.tool_calls", "array"),
        (_assistant(tool_calls=[{**CALL, "id": 1}]), "messages.1.tool_calls.0.id", "a string"),
        (_assistant(tool_calls=[{**CALL, "function": {"name": "f"}}]), "messages.1.tool_calls.0.function.arguments", "required"),
        (_assistant(tool_calls=[{**CALL, "type": "custom"}]), "messages.1.tool_calls.0", "of the form"),
        (_assistant(content="x", reasoning_content=1), "messages.1.reasoning_content", "a string"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parsed(**fields)
    assert caught.value.param == param
    assert words in caught.value.message


BODY: dict[str, Any] = {"messages": [USER], "tools": TOOLS}
SCRIPT = (
    OutputPiece("", (1,), reasoning="h"),
    OutputPiece("I look.", (2,), reasoning="m"),
    OutputPiece("", (3,), tool_calls=(ToolCallDelta(0, '{"city"', "call_a", "get_weather"),)),
    OutputPiece("", (4,), tool_calls=(ToolCallDelta(0, ': "Paris"}'), ToolCallDelta(1, "{}", "call_b", "now"))),
    OutputPiece("", (5,), "tool_calls"),
)


async def test_an_answer_has_reasoning_and_calls() -> None:
    client = await Client(FakeEngine(*SCRIPT)).request("POST", "/v1/chat/completions", json.dumps(BODY).encode())
    (choice,) = client.json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "I look.",
        "refusal": None,
        "reasoning_content": "hm",
        "reasoning": "hm",
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }


async def test_calls_alone_have_no_content() -> None:
    engine = FakeEngine(*SCRIPT[2:])
    client = await Client(engine).request("POST", "/v1/chat/completions", json.dumps(BODY).encode())
    assert client.json["choices"][0]["message"]["content"] is None


async def test_a_stream_adds_up_to_the_whole_answer() -> None:
    client = await Client(FakeEngine(*SCRIPT)).request(
        "POST", "/v1/chat/completions", json.dumps({**BODY, "stream": True}).encode()
    )
    choices = [event["choices"][0] for event in client.events[:-1]]
    deltas = [choice["delta"] for choice in choices]
    assert [delta.get("reasoning_content") for delta in deltas[1:3]] == ["h", "m"]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert parts == [
        {"index": 0, "id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city"'}},
        {"index": 0, "function": {"arguments": ': "Paris"}'}},
        {"index": 1, "id": "call_b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"
