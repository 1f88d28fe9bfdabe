"""Ollama's API: /api/chat and /api/generate whole and as lines, and what its clients ask besides."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from headrace.errors import InvalidRequestError, RequestFailedError
from services.router.generation import (
    ChatTurn,
    Constraint,
    ConversationPrompt,
    OutputPiece,
    TextPrompt,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
)
from services.router.http import ollama
from services.router.http.app import HttpApp
from services.router.http.ollama_routes import OllamaRoutes
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, Answer, ask

WEATHER = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": {"type": "object"}}}


def app(engine: FakeEngine) -> HttpApp:
    return HttpApp(engine, LIMITS, OllamaRoutes(engine).routes())


async def chat(engine: FakeEngine, **fields: Any) -> Answer:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return await ask(app(engine), "POST", "/api/chat", body)


PIECES = [
    OutputPiece("", (1,), reasoning="so"),
    OutputPiece("a", (2,), reasoning=" it is"),
    OutputPiece("b", (3,)),
    OutputPiece("", (4,), tool_calls=(ToolCallDelta(0, id="call_1", name="weather"), ToolCallDelta(0, '{"city": '))),
    OutputPiece("", (5,), tool_calls=(ToolCallDelta(0, '"Rome"}'), ToolCallDelta(1, "{}", "call_2", "weather"))),
    OutputPiece("", (), "tool_calls"),
]


async def test_a_chat_is_a_stream_of_lines_unless_it_shall_not_be() -> None:
    whole = (await chat(FakeEngine(*PIECES), stream=False)).json
    answer = await chat(FakeEngine(*PIECES))
    assert answer.headers["content-type"] == "application/x-ndjson"
    *lines, last = answer.lines
    assert [line["done"] for line in answer.lines] == [False] * len(lines) + [True]
    message = whole["message"]
    for field in ("content", "thinking"):
        assert "".join(line["message"].get(field, "") for line in lines) == message[field]
    calls = [call for line in lines for call in line["message"].get("tool_calls", [])]
    assert calls == message["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"index": 0, "name": "weather", "arguments": {"city": "Rome"}},
        {"index": 1, "name": "weather", "arguments": {}},
    ]
    for told in (whole, last):
        assert (told["done_reason"], told["prompt_eval_count"], told["eval_count"]) == ("stop", 3, 5)
        assert told["total_duration"] >= told["prompt_eval_duration"] + told["eval_duration"] - 1
        assert told["created_at"].endswith("Z")


async def test_generate_answers_with_a_response() -> None:
    engine = FakeEngine()
    whole = await ask(
        app(engine), "POST", "/api/generate", {"model": "m:latest", "prompt": "hi", "system": "be brief", "stream": False}
    )
    assert whole.json["response"] == "Hello!"
    assert engine.requests[0].prompt == ConversationPrompt((ChatTurn("system", "be brief"), ChatTurn("user", "hi")))
    raw = await ask(app(engine), "POST", "/api/generate", {"model": "m", "prompt": "hi", "raw": True})
    assert "".join(line["response"] for line in raw.lines) == "Hello!"
    assert engine.requests[1].prompt == TextPrompt("hi")


async def test_without_a_prompt_the_model_is_said_to_be_loaded() -> None:
    engine = FakeEngine()
    assert (await chat(engine, messages=[])).json["done_reason"] == "load"
    assert (await ask(app(engine), "POST", "/api/generate", {"model": "m"})).json["done_reason"] == "load"
    assert (await ask(app(engine), "POST", "/api/generate", {"model": "x"})).json == {
        "error": "the model 'x' does not exist or is not served now"
    }
    assert not engine.requests


async def test_the_length_is_a_reason_to_be_done() -> None:
    assert (await chat(FakeEngine(OutputPiece("a", (1,), "length")), stream=False)).json["done_reason"] == "length"


async def test_logprobs_are_told_with_the_text() -> None:
    engine = FakeEngine(OutputPiece("a", (1,), "stop", logprobs=(TokenLogprob(1, b"a", -0.5),)))
    told = (await chat(engine, stream=False, logprobs=True, top_logprobs=3)).json["logprobs"]
    assert told == [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]
    assert engine.requests[0].logprobs == 3


async def test_a_stream_tells_the_logprobs_of_tokens_without_text_too() -> None:
    pieces = [OutputPiece("", (1,), logprobs=(TokenLogprob(1, b"\xc3", -0.5),)), OutputPiece("é", (2,), "stop")]
    lines = (await chat(FakeEngine(*pieces), logprobs=True)).lines
    whole = (await chat(FakeEngine(*pieces), stream=False, logprobs=True)).json
    assert [one for line in lines for one in line.get("logprobs", ())] == whole["logprobs"]
    assert len(whole["logprobs"]) == 1


async def test_an_error_is_a_line_of_its_own() -> None:
    answer = await chat(FakeEngine(OutputPiece("a", (1,)), RequestFailedError("broke")))
    assert answer.lines[-1] == {"error": "broke"}
    refused = await chat(FakeEngine(RequestFailedError("broke")))
    assert (refused.status, refused.json) == (500, {"error": "broke"})


async def test_a_disconnect_closes_the_stream() -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    answer = Answer()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    task = asyncio.create_task(ask(app(engine), "POST", "/api/chat", body, answer=answer))
    async with asyncio.timeout(WAIT_S):
        while not answer.chunks:  # noqa: ASYNC110
            await asyncio.sleep(0)
        answer.gone.set()
        await task
    assert engine.ended == [("499", "aborted")]


async def test_models_and_the_version_are_told() -> None:
    here = app(FakeEngine())
    (model,) = (await ask(here, "GET", "/api/tags")).json["models"]
    assert (model["name"], model["modified_at"]) == ("m", "1970-01-01T00:00:07Z")
    (loaded,) = (await ask(here, "GET", "/api/ps")).json["models"]
    assert loaded["context_length"] == 128
    shown = (await ask(here, "POST", "/api/show", {"model": "m:latest"})).json
    assert shown["model_info"]["general.context_length"] == 128
    assert (await ask(here, "POST", "/api/show", {"name": "x"})).status == 404
    assert (await ask(here, "GET", "/api/version")).json["version"]


def parse(**fields: Any) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ollama.parse_chat(json.dumps(body).encode()).generation


def test_options_turns_and_tools_are_taken_over() -> None:
    options = {"num_predict": 7, "top_k": 0, "repeat_penalty": 1.1, "stop": "x", "seed": 3, "num_ctx": 4096, "mirostat": 0}
    asked = parse(options=options, format={"type": "object"}, think="low", tools=[WEATHER], keep_alive="5m")
    assert (asked.stopping.max_tokens, asked.stopping.stop) == (7, ("x",))
    assert (asked.sampling.top_k, asked.sampling.repetition_penalty, asked.sampling.seed) == (-1, 1.1, 3)
    assert asked.constraint == Constraint("json_schema", '{"type":"object"}', param="format")
    assert asked.prompt.template_kwargs == {"enable_thinking": True, "reasoning_effort": "low"}
    assert asked.prompt.tools == (Tool("weather", "now", {"type": "object"}),)
    assert parse(format="json").constraint == Constraint("json_object", param="format")
    assert parse(format="", options={"num_predict": -1}).stopping.max_tokens is None
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "thinking": "hm", "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "sun", "tool_name": "weather"},
    ]
    assert parse(messages=messages).prompt.turns == (
        ChatTurn("user", "hi"),
        ChatTurn("assistant", "", tool_calls=(ToolCall("call_1_0", "weather", '{"a":1}'),), reasoning="hm"),
        ChatTurn("tool", "sun", name="weather", tool_call_id="call_1_0"),
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": ""}, "model", "at least 1"),
        ({"options": {"temperature": 3}}, "options.temperature", "in [0, 2]; got 3"),
        ({"options": {"num_predict": 0}}, "options.num_predict", "in [1,"),
        ({"options": {"repeat_penalty": 3}}, "options.repeat_penalty", "(0, 2]"),
        ({"options": {"temprature": 1}}, "options.temprature", "did you mean temperature?"),
        ({"options": {"mirostat": 2}}, "options.mirostat", "not supported"),
        ({"format": "xml"}, "format", 'a JSON schema; got \'xml\''),
        ({"think": "very"}, "think", "true, false"),
        ({"top_logprobs": 2}, "top_logprobs", "0 unless logprobs"),
        ({"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, "messages.0.images", "at most 0"),
        (
            {"messages": [{"role": "user", "tool_calls": [{"function": {"name": "a", "arguments": {}}}]}]},
            "messages.0.tool_calls", "assistant",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name", "different"),
        ({"sufix": "x"}, "sufix", "unknown field"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_field_limit_and_value(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse(**fields)
    assert refused.value.param == param, refused.value.message
    assert words in refused.value.message
