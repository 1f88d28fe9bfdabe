"""Anthropic's /v1/messages: requests in, whole and streamed answers out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from headrace.errors import InvalidRequestError, RequestFailedError, UnavailableError
from services.router.generation import (
    ChatTurn,
    Constraint,
    ConversationPrompt,
    OutputPiece,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)
from services.router.http import anthropic
from services.router.http.anthropic_routes import AnthropicRoutes
from services.router.http.app import HttpApp
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, Answer, ask

WEATHER = {"name": "weather", "description": "now", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}], **fields}


def app(engine: FakeEngine) -> HttpApp:
    return HttpApp(engine, LIMITS, AnthropicRoutes(engine).routes())


async def create(engine: FakeEngine, **fields: Any) -> Answer:
    return await ask(app(engine), "POST", "/v1/messages", body(**fields))


def rebuilt(events: list[tuple[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events make, checked for their order."""
    assert [name for name, _ in events] == [value["type"] for _, value in events]
    (_, start), (ping, _), *rest, (_, delta), (stop, _) = events
    assert (ping, stop) == ("ping", "message_stop")
    message = start["message"]
    is_open = False
    for _, event in rest:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert not is_open
            assert index == len(message["content"])
            message["content"].append(event["content_block"])
            is_open = True
        elif event["type"] == "content_block_stop":
            assert is_open
            is_open = False
        else:
            assert is_open
            block, part = message["content"][index], event["delta"]
            if part["type"] == "input_json_delta":
                block["input"] = (block["input"] or "") + part["partial_json"]
            else:
                block[block["type"]] += part[block["type"]]
    assert not is_open
    return {**message, **delta["delta"], "usage": delta["usage"]}


async def test_an_answer_has_anthropics_shape_and_usage() -> None:
    engine = FakeEngine()
    answer = await create(engine)
    assert answer.status == 200
    assert answer.json == {
        "id": "msg_id0",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 1, "output_tokens": 3},
    }
    assert answer.headers["request-id"] == "id0"
    assert engine.requests[0].stopping.max_tokens == 64


PIECES = [
    OutputPiece("", (1,), reasoning="so"),
    OutputPiece("a", (2,), reasoning=" it is"),
    OutputPiece("b", (3,)),
    OutputPiece("", (4,), tool_calls=(ToolCallDelta(0, id="call_1", name="weather"), ToolCallDelta(0, '{"city": '))),
    OutputPiece("", (5,), tool_calls=(ToolCallDelta(0, '"Rome"}'), ToolCallDelta(1, "{}", "call_2", "weather"))),
    OutputPiece("", (), "tool_calls"),
]


async def test_a_stream_makes_the_same_message_as_the_whole_answer() -> None:
    whole = (await create(FakeEngine(*PIECES), tools=[WEATHER])).json
    answer = await create(FakeEngine(*PIECES), tools=[WEATHER], stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    streamed = rebuilt(answer.events)
    for block in streamed["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"])
    assert streamed == whole
    assert whole["stop_reason"] == "tool_use"
    assert whole["content"] == [
        {"type": "thinking", "signature": "", "thinking": "so it is"},
        {"type": "text", "text": "ab"},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
        {"type": "tool_use", "id": "call_2", "name": "weather", "input": {}},
    ]


async def test_a_tool_call_cut_off_by_the_length_keeps_what_there_is() -> None:
    pieces = [OutputPiece("", (1,), "length", tool_calls=(ToolCallDelta(0, '{"ci', "c", "weather"),))]
    answer = await create(FakeEngine(*pieces), tools=[WEATHER])
    assert answer.json["stop_reason"] == "max_tokens"
    assert answer.json["content"][0]["input"] == {"incomplete_json": '{"ci'}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_sequence_is_named_and_not_in_the_text(stream: bool) -> None:
    engine = FakeEngine(OutputPiece("one ", (1,)), OutputPiece("two END", (2,), "stop"))
    answer = await create(engine, stop_sequences=["ND", "END"], stream=stream)
    message = rebuilt(answer.events) if stream else answer.json
    assert message["content"] == [{"type": "text", "text": "one two "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert engine.requests[0].stopping.include_stop_in_output


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_sequence_after_a_tool_call_is_named_beside_the_call(stream: bool) -> None:
    call = (ToolCallDelta(0, "{}", "call_1", "weather"),)
    engine = FakeEngine(OutputPiece("", (1,), tool_calls=call), OutputPiece("so END", (2,), "tool_calls"))
    answer = await create(engine, stop_sequences=["END"], tools=[WEATHER], stream=stream)
    message = rebuilt(answer.events) if stream else answer.json
    assert [block["type"] for block in message["content"]] == ["tool_use", "text"]
    assert message["content"][1]["text"] == "so "
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", "END")


async def test_an_end_of_its_own_is_no_stop_sequence() -> None:
    message = (await create(FakeEngine(OutputPiece("one", (1,), "stop")), stop_sequences=["END"])).json
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)


async def test_an_error_has_anthropics_shape_before_and_within_a_stream() -> None:
    answer = await create(FakeEngine(UnavailableError("none", retry_after_s=3)), stream=True)
    assert (answer.status, answer.headers["retry-after"]) == (503, "3")
    assert answer.json == {"type": "error", "error": {"type": "overloaded_error", "message": "none"}}
    answer = await create(FakeEngine(OutputPiece("a", (1,)), RequestFailedError("broke")), stream=True)
    assert answer.status == 200
    assert answer.events[-1] == ("error", {"type": "error", "error": {"type": "api_error", "message": "broke"}})
    assert answer.is_done


async def test_a_disconnect_closes_the_stream() -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    answer = Answer()
    task = asyncio.create_task(ask(app(engine), "POST", "/v1/messages", body(stream=True), answer=answer))
    async with asyncio.timeout(WAIT_S):
        while not answer.chunks:  # noqa: ASYNC110
            await asyncio.sleep(0)
        answer.gone.set()
        await task
    assert engine.ended == [("499", "aborted")]


async def test_tokens_are_counted_without_generating() -> None:
    engine = FakeEngine()
    answer = await ask(
        app(engine),
        "POST",
        "/v1/messages/count_tokens",
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]},
    )
    assert answer.json == {"input_tokens": 3}
    assert not engine.requests


async def test_a_request_is_counted_to_its_key_or_its_user() -> None:
    engine = FakeEngine()
    await ask(app(engine), "POST", "/v1/messages", body(), x_api_key="k", anthropic_version="2023-06-01")
    await ask(app(engine), "POST", "/v1/messages", body(), authorization="Bearer k")
    await create(engine, metadata={"user_id": "me"})
    assert engine.calls[0].tenant == engine.calls[1].tenant != ""
    assert engine.calls[2].tenant == "user:me"


async def test_models_are_listed_in_the_shape_of_who_asks() -> None:
    listed = await ask(app(FakeEngine()), "GET", "/v1/models", anthropic_version="2023-06-01")
    model = {"type": "model", "id": "m", "display_name": "m", "created_at": "1970-01-01T00:00:07Z"}
    assert listed.json == {"data": [model], "has_more": False, "first_id": "m", "last_id": "m"}
    assert (await ask(app(FakeEngine()), "GET", "/v1/models/m", anthropic_version="2023-06-01")).json == model
    assert (await ask(app(FakeEngine()), "GET", "/v1/models/m")).json["object"] == "model"


async def test_an_unknown_version_is_refused() -> None:
    answer = await ask(app(FakeEngine()), "POST", "/v1/messages", body(), anthropic_version="v1")
    assert answer.status == 400
    assert answer.json["error"]["message"] == "anthropic-version must be a date such as 2023-06-01; got 'v1'"


def prompt(**fields: Any) -> ConversationPrompt:
    made = anthropic.parse_messages(json.dumps(body(**fields)).encode()).generation.prompt
    assert isinstance(made, ConversationPrompt)
    return made


def test_blocks_become_turns() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "in Rome?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "look", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "and?"},
            ],
        },
        {"role": "assistant", "content": "It is"},
    ]
    made = prompt(messages=messages, system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}], tools=[WEATHER])
    assert made.turns == (
        ChatTurn("system", "Be brief."),
        ChatTurn("user", "weather\nin Rome?"),
        ChatTurn("assistant", "I look.", tool_calls=(ToolCall("c1", "weather", '{"city":"Rome"}'),), reasoning="look"),
        ChatTurn("tool", "sun", name="weather", tool_call_id="c1"),
        ChatTurn("user", "and?"),
        ChatTurn("assistant", "It is"),
    )
    assert (made.add_generation_prompt, made.continue_final_message) == (False, True)
    assert made.tools == (Tool("weather", "now", WEATHER["input_schema"]),)


def test_thinking_and_tool_choice_are_taken_over() -> None:
    def parsed(**fields: Any) -> Any:
        return anthropic.parse_messages(json.dumps(body(**fields)).encode()).generation

    asked = parsed(thinking={"type": "enabled", "budget_tokens": 32})
    assert asked.reasoning.budget_tokens == 32
    assert asked.prompt.template_kwargs == {"enable_thinking": True}
    assert parsed().prompt.template_kwargs == {"enable_thinking": False}
    assert parsed(thinking={"type": "adaptive"}, output_config={"effort": "max"}).prompt.template_kwargs == {
        "enable_thinking": True,
        "reasoning_effort": "high",
    }
    form = {"type": "json_schema", "schema": {"type": "object"}}
    constraint = Constraint("json_schema", '{"type":"object"}', param="output_config.format.schema")
    assert parsed(output_config={"format": form}).constraint == constraint
    for choice, expected in (
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "auto"}, ToolChoice()),
        ({"type": "none"}, ToolChoice("none")),
        ({"type": "tool", "name": "weather"}, ToolChoice("named", "weather")),
    ):
        assert parsed(tools=[WEATHER], tool_choice=choice).tool_choice == expected
    assert not parsed(tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True}).parallel_tool_calls


RESULT = {"type": "tool_result", "tool_use_id": "nope", "content": "x"}
USE = {"type": "tool_use", "id": "c", "name": "n", "input": {}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be in [1,"),
        ({"max_tokens": None}, "max_tokens", "max_tokens must be a valid integer; got None"),
        ({"temperature": 2.5}, "temperature", "temperature must be in [0, 2]; got 2.5"),
        ({"top_p": 0}, "top_p", "top_p must be in (0, 1]"),
        ({"stop_sequences": [""]}, "stop_sequences", "stop_sequences must be strings of 1 to"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences", "at most 16 strings"),
        ({"max_token": 3}, "max_token", "unknown field max_token; did you mean max_tokens?"),
        ({"messages": []}, "messages", "messages must"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role", "'user' or 'assistant'; got 'system'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "1 to 4096 blocks"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0.type",
            "got 'image'",
        ),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.content.0.tool_use_id", "got 'nope'"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages.0.content.0.type", "one of text, tool_result"),
        ({"messages": [{"role": "assistant", "content": [USE]}]}, "messages.0.content", "a tool_result block must follow"),
        ({"messages": [{"role": "assistant", "content": [USE, USE]}]}, "messages.0.content.1.id", "different"),
        ({"thinking": {"type": "enabled", "budget_tokens": 64}}, "thinking.budget_tokens", "less than max_tokens, 64; got 64"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "required"),
        ({"thinking": {"type": "disabled", "budget_tokens": 6}}, "thinking.budget_tokens", "left out"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "without tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name", "got 'x'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name", "got None"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name", "different"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools.0.name", "pattern"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type", "'custom'"),
        ({"container": "c"}, "container", "not supported"),
        ({"metadata": {"user_id": "x", "name": "y"}}, "metadata.name", "unknown field"),
    ],
)
def test_bad_values_are_refused_with_field_limit_and_value(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        anthropic.parse_messages(json.dumps(body(**fields)).encode())
    assert refused.value.param == param, refused.value.message
    assert words in refused.value.message


def test_ignored_fields_are_accepted() -> None:
    ignored = dict.fromkeys(anthropic.IGNORED_FIELDS, "anything")
    assert anthropic.parse_messages(json.dumps(body(**ignored)).encode()).generation.model == "m"
