"""Tool calls and reasoning with the default model, trained on neither: a grammar makes it call, a budget ends its thoughts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Paris today, in celsius?"}]


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def ask(server: Server, **fields: Any) -> Any:
    fields = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 400, "seed": 1, **fields}
    return client(server).chat.completions.create(**fields)


def check_calls(calls: Any) -> None:
    """Every call is of a tool, and its arguments fit that tool's schema."""
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert call.id.startswith("call_")


def test_required_calls_parse_and_validate(server: Server) -> None:
    for seed in range(4):
        choice = ask(server, tool_choice="required", seed=seed).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        check_calls(choice.message.tool_calls)


def test_one_call_of_the_tool_that_was_named(server: Server) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    message = ask(server, tool_choice=named, parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_weather"]
    check_calls(message.tool_calls)


def test_a_stream_of_calls_adds_up_to_the_whole(server: Server) -> None:
    whole = ask(server, tool_choice="required").choices[0].message.tool_calls
    calls: list[list[str]] = []
    reasons = []
    for chunk in ask(server, tool_choice="required", stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            if part.id:
                assert part.index == len(calls)
                calls.append([part.function.name, ""])
            calls[part.index][1] += part.function.arguments
        reasons.append(chunk.choices[0].finish_reason)
    assert calls == [[call.function.name, call.function.arguments] for call in whole]
    assert reasons[-1] == "tool_calls"


def test_results_of_calls_go_on_as_a_conversation(server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    ]
    choice = ask(server, messages=messages, tool_choice="none", max_tokens=16, temperature=0).choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content


def test_a_function_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, tool_choice={"type": "function", "function": {"name": "launch"}})
    assert caught.value.param == "tool_choice"
    assert "'launch'" in caught.value.message


def earlier_calls(*cities: str) -> list[Any]:
    """Turns in which the assistant has called as the schema forbids, for a small model to go on with."""
    found: list[Any] = []
    for city in cities:
        call = json.dumps({"name": "get_weather", "arguments": {"city": city, "unit": "celsius"}})
        found += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
        ]
    return found


@pytest.mark.usefixtures("native_library")
def test_calls_of_strict_tools_that_a_model_makes_by_itself_fit_their_schemas(server: Server) -> None:
    """Goal: under auto, text is free, and a call that begins is right. Method: examples of calls that the schema forbids."""
    unit = {"enum": ["kelvin"]}
    schema = {**WEATHER, "properties": {**WEATHER["properties"], "unit": unit}, "required": ["city", "unit", "days"]}
    messages = [*earlier_calls("Rome", "Berlin", "Madrid"), {"role": "user", "content": "What is the weather in Paris?"}]
    fields: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 120}

    def tools(*, strict: bool) -> list[Any]:
        return [{"type": "function", "function": {"name": "get_weather", "parameters": schema, "strict": strict}}]

    (loose,) = ask(server, **fields, tools=tools(strict=False)).choices[0].message.tool_calls
    assert json.loads(loose.function.arguments)["unit"] == "celsius"
    choice = ask(server, **fields, tools=tools(strict=True), parallel_tool_calls=False).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, schema)
    assert arguments["city"] == "Paris"
    plain = ask(server, tools=tools(strict=True), messages=[{"role": "user", "content": "Say hello."}], max_tokens=12)
    assert plain.choices[0].message.content


@pytest.fixture(scope="module")
def thinker(default_model_directory: Path, model_store: Path) -> Iterator[Server]:
    """The default model, taken for one that begins inside a block of reasoning."""
    with Server(model_store, tokenizer_reasoning_parser="deepseek_r1") as server:
        yield server


def think(server: Server, **fields: Any) -> Any:
    fields = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 60, **fields}
    return client(server).chat.completions.create(**fields)


@pytest.mark.usefixtures("native_library")
def test_a_reasoning_budget_ends_the_block_and_an_answer_follows(thinker: Server) -> None:
    answer = think(thinker, extra_body={"reasoning_budget_tokens": 12})
    message = answer.choices[0].message
    endless = think(thinker)
    assert message.content
    assert endless.choices[0].message.reasoning_content.startswith(message.reasoning_content)
    assert not endless.choices[0].message.content
    details = answer.usage.completion_tokens_details
    assert 12 < details.reasoning_tokens < 24 <= answer.usage.completion_tokens
    deltas = [chunk.choices[0].delta for chunk in think(thinker, stream=True, extra_body={"reasoning_budget_tokens": 12})]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content


@pytest.mark.usefixtures("native_library")
def test_reasoning_stays_in_the_text_or_comes_whole_when_asked(thinker: Server) -> None:
    budget = {"reasoning_budget_tokens": 12}
    message = think(thinker, extra_body=budget).choices[0].message
    inline = think(thinker, extra_body={**budget, "separate_reasoning": False}).choices[0].message
    thoughts, _, text = inline.content.partition("</think>")
    assert (thoughts.strip(), text.strip()) == (message.reasoning_content, message.content.strip())
    held = think(thinker, stream=True, extra_body={**budget, "stream_reasoning": False})
    reasonings = [getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in held]
    assert [reasoning for reasoning in reasonings if reasoning] == [message.reasoning_content]


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_forced_call_comes_behind_reasoning(thinker: Server, is_streaming: bool) -> None:
    """A budget ends the block, which this model would not end by itself: what is put behind it then is in the grammar too."""
    fields: dict[str, Any] = {
        "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300,
        "extra_body": {"reasoning_budget_tokens": 12},
    }  # fmt: skip
    if not is_streaming:
        choice = think(thinker, **fields).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.reasoning_content
        assert not choice.message.content
        check_calls(choice.message.tool_calls)
        return
    deltas = [chunk.choices[0].delta for chunk in think(thinker, stream=True, **fields)]
    calls = [part.function for delta in deltas for part in delta.tool_calls or ()]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    jsonschema.validate(json.loads("".join(call.arguments for call in calls)), SCHEMAS[calls[0].name])


@pytest.mark.usefixtures("native_library")
def test_a_schema_holds_behind_reasoning(thinker: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    message = think(thinker, response_format=form, max_tokens=200, extra_body={"reasoning_budget_tokens": 12}).choices[0].message
    assert message.reasoning_content
    jsonschema.validate(json.loads(message.content), WEATHER)
