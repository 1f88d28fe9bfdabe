"""Anthropic's own Python client against the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 32,
    "extra_body": {"temperature": 0},
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
}


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.http, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def text_of(message: Any) -> str:
    """The text of a message that is one block of it."""
    (block,) = message.content
    assert block.type == "text"
    return str(block.text)


def test_a_message_is_answered(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASKED)
    assert message.content[0].type == "text"
    assert "Tokyo" in message.content[0].text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 10
    assert message.usage.output_tokens > 3
    assert message._request_id


def test_the_streamed_message_is_the_whole_one(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKED)
    assert whole.content[0].type == "text"
    stop = whole.content[0].text[8:12]
    message = client.messages.create(**ASKED, stop_sequences=[stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].type == "text"
    assert message.content[0].text == whole.content[0].text[: whole.content[0].text.index(stop)]
    with client.messages.stream(**ASKED, stop_sequences=[stop]) as stream:
        assert text_of(stream.get_final_message()) == text_of(message)


def test_the_length_ends_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**{**ASKED, "max_tokens": 3})
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)


def test_a_prefilled_answer_is_continued(client: anthropic.Anthropic) -> None:
    turns = [*ASKED["messages"], {"role": "assistant", "content": "The capital of Japan is"}]
    message = client.messages.create(**{**ASKED, "messages": turns, "max_tokens": 8})
    assert message.content[0].type == "text"
    assert "Tokyo" in message.content[0].text


def test_tokens_are_counted_as_they_are_charged(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=ASKED["messages"], system="Be brief.")
    usage = client.messages.create(**ASKED, system="Be brief.").usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(**{**ASKED, "model": "nope"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens must be in"):
        client.messages.create(**{**ASKED, "max_tokens": 0})


def test_models_are_listed(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).type == "model"


WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_that_must_be_used_is_used_and_its_result_read(client: anthropic.Anthropic, choice: Any) -> None:
    asked: dict[str, Any] = {
        **ASKED,
        "max_tokens": 96,
        "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
        "tools": [WEATHER],
    }
    message = client.messages.create(**asked, tool_choice=choice)
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert isinstance(call.input["city"], str)
    with client.messages.stream(**asked, tool_choice=choice) as stream:
        (streamed,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert (streamed.name, streamed.input) == (call.name, call.input)
    turns = [
        *asked["messages"],
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 21 degrees"}]},
    ]
    answer = client.messages.create(**{**asked, "messages": turns, "max_tokens": 16}, tool_choice={"type": "none"})
    assert answer.content[0].type == "text"


def test_an_answer_keeps_to_its_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        **{**ASKED, "max_tokens": 64}, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    assert message.content[0].type == "text"
    assert isinstance(json.loads(message.content[0].text)["city"], str)
