"""OpenAI's own Python client against the default model: chat, tools, structured output, errors, cancelled streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.e2e.process_tree import wait_until
from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
ASKED: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 12}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def joined(client: openai.OpenAI, **fields: Any) -> dict[int, str]:
    """What a stream says, by choice."""
    texts: dict[int, str] = {}
    for chunk in client.chat.completions.create(**{**ASKED, **fields}, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts


def counts(usage: Any) -> tuple[int, int, int]:
    """Tokens of the prompt, of the output and of both; how many were cached depends on what was asked before."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def text(client: openai.OpenAI, **fields: Any) -> str:
    content: str = client.chat.completions.create(**{**ASKED, **fields}).choices[0].message.content
    return content


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED)
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "Tokyo" in whole.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (chunks[-1].choices, counts(chunks[-1].usage)) == ([], counts(whole.usage))
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper_gives_the_whole_completion(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASKED, logprobs=True) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(deltas) == final.message.content == text(client)
    assert final.logprobs is not None
    assert "".join(item.token for item in final.logprobs.content or []).startswith(final.message.content or "?")


@pytest.mark.usefixtures("native_library")
def test_choices_have_seeds_of_their_own_and_come_again(client: openai.OpenAI) -> None:
    """Torch gives a row other last bits in another batch, and a draw may lie that near to a border."""
    fields: dict[str, Any] = {"temperature": 1.2, "n": 3, "seed": 7}
    choices = client.chat.completions.create(**{**ASKED, **fields}).choices
    texts = {choice.index: choice.message.content for choice in choices}
    assert list(texts) == [0, 1, 2]
    assert len(set(texts.values())) == 3
    assert joined(client, **fields) == texts


@pytest.mark.parametrize("fields", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}])
def test_a_draw_from_the_likeliest_token_alone_is_greedy(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    assert text(client, temperature=1.5, seed=1, **fields) == text(client)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = text(client)
    choice = client.chat.completions.create(**ASKED, stop=[" Japan", "never"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole.partition(" Japan")[0], "stop")
    assert joined(client, stop=" Japan") == {0: choice.message.content}


def test_the_limit_of_tokens_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**{**ASKED, "max_completion_tokens": 3})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    longer = client.chat.completions.create(**ASKED, extra_body={"ignore_eos": True, "min_tokens": 12})
    assert longer.usage.completion_tokens == 12


def test_a_bias_rules_and_penalties_are_taken(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**ASKED, "max_completion_tokens": 4, "logprobs": True, "logit_bias": {"1904": 100}}
    logprobs = client.chat.completions.create(**asked).choices[0].logprobs
    assert logprobs is not None
    assert len({item.token for item in logprobs.content or []}) == 1
    plain = text(client, max_completion_tokens=60, extra_body={"ignore_eos": True})
    fields = {"ignore_eos": True, "repetition_penalty": 1.5}
    penalised = text(client, max_completion_tokens=60, frequency_penalty=2, presence_penalty=2, extra_body=fields)
    assert penalised != plain


def test_logprobs_are_given_whole_and_streamed_alike(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**ASKED, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content
    for item in whole.content:
        assert item.token == item.top_logprobs[0].token
        assert item.logprob == item.top_logprobs[0].logprob <= 0
        assert len(item.top_logprobs) == 3
        assert bytes(item.bytes or []).decode(errors="replace") == item.token
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [
        item for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content or []
    ]
    assert [item.token for item in streamed] == [item.token for item in whole.content]
    assert [item.logprob for item in streamed] == pytest.approx([item.logprob for item in whole.content], abs=1e-4)


class Town(pydantic.BaseModel):
    """What an answer is parsed into."""

    name: Literal["Paris", "Rome"]
    rank: Literal[1, 2, 3]


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**ASKED, "max_completion_tokens": 64}
    parsed = client.chat.completions.parse(**asked, response_format=Town).choices[0].message.parsed
    assert isinstance(parsed, Town)
    with client.chat.completions.stream(**asked, response_format=Town) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_answers_keep_to_a_schema_and_to_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "digit", "strict": True, "schema": schema}}
    assert json.loads(text(client, response_format=form, max_completion_tokens=32))["n"] in range(10)
    answer = client.chat.completions.create(
        **{**ASKED, "max_completion_tokens": 100}, response_format={"type": "json_object"}
    ).choices[0]
    assert answer.message.content.lstrip().startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize(
    ("choice", "name"),
    [("required", None), ({"type": "function", "function": {"name": "get_weather"}}, "get_weather")],
    ids=["required", "named"],
)
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, choice: Any, name: str | None) -> None:
    asked: dict[str, Any] = {
        **ASKED,
        "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
        "max_completion_tokens": 96,
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    message = client.chat.completions.create(**asked).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name in ({name} if name else {"get_weather", "get_time"})
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == ({"city"} if call.function.name == "get_weather" else set())
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason in ("tool_calls", "stop")
    (streamed,) = final.message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    turns = [*asked["messages"], message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert text(client, messages=turns, tools=[WEATHER, CLOCK])


def test_tools_that_may_be_called_leave_an_answer(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        message = client.chat.completions.create(**ASKED, tools=[WEATHER], tool_choice=choice).choices[0].message
        assert message.content or message.tool_calls
        assert choice == "auto" or not message.tool_calls
        with client.chat.completions.stream(**ASKED, tools=[WEATHER], tool_choice=choice) as stream:
            streamed = stream.get_final_completion().choices[0].message
        assert (streamed.content or "") == (message.content or "")
        assert len(streamed.tool_calls or []) == len(message.tool_calls or [])


def test_fields_of_reasoning_and_of_a_callers_own_books_are_taken(client: openai.OpenAI) -> None:
    taken = text(
        client,
        reasoning_effort="low",
        user="me",
        metadata={"a": "b"},
        safety_identifier="x",
        prompt_cache_key="k",
        service_tier="auto",
        store=False,
        extra_body={"separate_reasoning": True, "chat_template_kwargs": {"enable_thinking": False}},
    )
    assert taken == text(client)


def test_a_message_is_continued(client: openai.OpenAI) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "The capital of Japan is"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert "Tokyo" in text(client, messages=turns, extra_body=fields)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"messages": []}, "messages"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{**ASKED, **fields}, stream=stream)
        assert str(refused.value.param).startswith(param)
        assert refused.value.type == "invalid_request_error"


def test_an_unknown_model_and_an_overlong_prompt_are_told_apart(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**ASKED, "model": "nope"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as overlong:
        client.chat.completions.create(**{**ASKED, "messages": [{"role": "user", "content": "word " * 9000}]})
    assert overlong.value.code == "context_length_exceeded"


def test_a_stream_that_is_closed_frees_its_place(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(
        **{**ASKED, "max_completion_tokens": 4000}, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    # The gauge is set several times a second.
    wait_until(lambda: server.metric("headrace_router_open_requests") == 1, WAIT_S, "the request is counted")
    stream.close()
    wait_until(lambda: server.metric("headrace_router_open_requests") == 0, WAIT_S, "the request is forgotten")


def test_fields_that_other_servers_know_are_taken(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    )
    # All but the first, which only opens the message.
    said = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(said) == len(chunks) - 1
    assert said == sorted(said)
    whole = client.chat.completions.create(**ASKED, extra_body={"prompt_logprobs": 1, "cache_salt": "a"}).model_dump()
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    stopped = client.chat.completions.create(**ASKED, extra_body={"stop_token_ids": [19081], "skip_special_tokens": False}).choices[
        0
    ]
    assert stopped.finish_reason == "stop"
    assert "Tokyo" not in (stopped.message.content or "")
