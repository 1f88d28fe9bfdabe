"""OpenAI's shapes: what is taken, what is refused and how, what is rendered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidRequestError, NotFoundError, OverloadedError
from services.router.generation import ChatTurn, ConversationPrompt, OutputPiece, TextPrompt, TokenPrompt
from services.router.http.openai import parse_chat, parse_completion, parse_detokenize, parse_tokenize
from services.router.http.openai_answers import ChatAnswer, CompletionAnswer, error_object, error_status, usage

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def refusal(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    return caught.value


def test_a_plain_chat_is_taken_with_every_choice_left_open() -> None:
    parsed = chat()
    assert parsed.generation.prompt == ConversationPrompt((ChatTurn("user", "hi"),))
    assert parsed.generation.sampling.temperature is None
    assert parsed.generation.stopping.max_tokens is None
    assert not parsed.is_streaming


def test_all_supported_fields_arrive() -> None:
    parsed = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=-1,
        max_completion_tokens=7,
        min_tokens=2,
        ignore_eos=True,
        stop=["a", "b"],
        stop_token_ids=[3],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        stream=True,
        stream_options={"include_usage": True},
        user="me",
        metadata={"a": "b"},
        service_tier="flex",
    )
    generation = parsed.generation
    assert (generation.sampling.temperature, generation.sampling.top_k, generation.sampling.seed) == (0.5, 40, -1)
    assert (generation.stopping.max_tokens, generation.stopping.min_tokens, generation.stopping.ignore_eos) == (7, 2, True)
    assert (generation.stopping.stop, generation.stopping.stop_token_ids) == (("a", "b"), (3,))
    assert generation.stopping.include_stop_in_output
    assert not generation.skip_special_tokens
    assert parsed.is_streaming
    assert parsed.include_usage


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("logprobs", False),
        ("logprobs", None),
        ("top_logprobs", 0),
        ("frequency_penalty", 0),
        ("presence_penalty", 0.0),
        ("response_format", {"type": "text"}),
        ("tools", []),
        ("tool_choice", "none"),
        ("logit_bias", {}),
        ("store", False),
        ("parallel_tool_calls", True),
        ("modalities", ["text"]),
        ("reasoning_effort", None),
    ],
)
def test_fields_of_later_versions_are_taken_at_their_defaults(field: str, value: object) -> None:
    assert chat(**{field: value}).generation.model == "m"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "end"),
        ("audio", {}),
        ("store", True),
    ],
)
def test_fields_we_cannot_honour_are_refused_by_name(field: str, value: object) -> None:
    error = refusal(**{field: value})
    assert error.param == field
    assert "not supported yet" in error.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 2.1}, "temperature", "[0, 2]; got 2.1"),
        ({"temperature": -0.1}, "temperature", "[0, 2]"),
        ({"temperature": "hot"}, "temperature", "got 'hot'"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"top_k": -2}, "top_k", "[-1, 2147483647]"),
        ({"min_p": 1.5}, "min_p", "[0, 1]"),
        ({"seed": 2**64}, "seed", "seed must be"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"n": 0}, "n", "[1, 128]; got 0"),
        ({"n": 129}, "n", "[1, 128]; got 129"),
        ({"n": True}, "n", "integer"),
        ({"n": "2"}, "n", "integer"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "[-2, 2]; got 2.5"),
        ({"presence_penalty": -2.1}, "presence_penalty", "[-2, 2]; got -2.1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "(0, 2]; got 0"),
        ({"repetition_penalty": "x"}, "repetition_penalty", "number"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "keys are token ids; got 'a'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "got '-1'"),
        ({"logit_bias": {"3000000000": 1}}, "logit_bias", "[0, 2147483647]"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "[-100, 100]; got 101"),
        ({"logit_bias": {"7": "x"}}, "logit_bias.7", "number"),
        ({"logit_bias": {"7": 1, "07": 2}}, "logit_bias", "named once each; got '7 twice'"),
        ({"logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias", "at most 1024 tokens; got '1025 of them'"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "[0, 20]; got 21"),
        ({"top_logprobs": 2}, "top_logprobs", "unless logprobs is true; got 2"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "[0, 20]; got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "[0, 20]; got -1"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "left out when stream is true"),
        ({"best_of": 2}, "best_of", "unknown field"),
        ({"echo": True}, "echo", "unknown field"),
        ({"max_tokens": 0}, "max_tokens", "[1, 2147483647]; got 0"),
        ({"max_tokens": -5}, "max_tokens", "got -5"),
        ({"max_tokens": 10**12}, "max_tokens", "got 1000000000000"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must be"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "equal to max_completion_tokens, 4"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "at most max_tokens, 3"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop", "1 to 256 characters"),
        ({"stop": "x" * 257}, "stop", "one of 257"),
        ({"stop": 5}, "stop", "string"),
        ({"stop": [5]}, "stop", "array of strings; got [5]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "got -1"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "unless stream is true"),
        ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope", "unknown field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [5]}, "messages.0", "dictionary"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "one of system"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "got 'robot'"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role", "send role 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood", "unknown field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0",
            "not supported yet",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0", "of the form"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls.0", "of the form"),
        ({"continue_final_message": True}, "continue_final_message", "assistant"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ],
)
def test_bad_values_are_refused_with_field_limit_and_value(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert words in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "\xff"}', b'{"messages": NaN}', b'"\\ud800"', b"[" * 100_000, b"1e999"],
)
def test_a_body_that_is_no_json_object_is_one_clear_error(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="body"):
        parse_chat(body)


def test_missing_messages_are_named() -> None:
    with pytest.raises(InvalidRequestError, match="messages is required"):
        parse_chat(b'{"model": "m"}')


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "messages",
        "prompt",
        "model",
        "stop",
        "temperature",
        "n",
        "stream",
        "stream_options",
        "max_tokens",
        "seed",
        "tokens",
        "user",
        "x",
    ]
)


@given(st.dictionaries(FIELDS, JSON, max_size=6))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_either_taken_or_refused_with_a_field(body: dict[str, Any]) -> None:
    for parse in (parse_chat, parse_completion, parse_tokenize, parse_detokenize):
        try:
            parse(json.dumps(body).encode())
        except InvalidRequestError as error:
            assert error.param


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parsed = chat(
        messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"}]
    )
    assert parsed.generation.prompt.turns == (ChatTurn("system", "ab", "x"),)


def test_an_assistant_message_of_the_sdk_can_be_sent_back() -> None:
    message = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
    }
    parsed = chat(messages=[*MESSAGES, message], continue_final_message=True)
    assert parsed.generation.prompt.continue_final_message
    assert not parsed.generation.prompt.add_generation_prompt


def test_completions_take_text_or_one_list_of_tokens() -> None:
    assert parse_completion(b'{"prompt": "x"}').generation.prompt == TextPrompt("x")
    assert parse_completion(b'{"prompt": ["x"]}').generation.prompt == TextPrompt("x")
    prompt = parse_completion(b'{"prompt": [[1, 2]], "max_tokens": 3}').generation.prompt
    assert isinstance(prompt, TokenPrompt)
    assert prompt.token_ids.tolist() == [1, 2]
    assert parse_completion(b'{"prompt": "x"}').generation.stopping.max_tokens == 16


@pytest.mark.parametrize(
    "prompt",
    [
        '""',
        "[]",
        '["a", [1]]',
        '["a", ""]',
        "[[1], []]",
        "[1, true]",
        "[-1]",
        "[1.5]",
        "[4294967296]",
        "5",
        "null",
        '[{"a": 1}]',
        "[[[1]]]",
    ],
)
def test_bad_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_completion(b'{"prompt": %s}' % prompt.encode())
    assert caught.value.param == "prompt"


def test_tokenize_wants_exactly_one_kind_of_prompt() -> None:
    assert parse_tokenize(b'{"prompt": "x"}').prompt == TextPrompt("x")
    assert isinstance(parse_tokenize(b'{"messages": [{"role": "user", "content": "x"}]}').prompt, ConversationPrompt)
    for body in (b"{}", b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}'):
        with pytest.raises(InvalidRequestError, match="exactly one"):
            parse_tokenize(body)
    assert parse_detokenize(b'{"tokens": [1, 2]}').token_ids == [1, 2]


@given(st.text())
def test_a_chunks_text_survives_rendering(text: str) -> None:
    answer = ChatAnswer("id", model='m"\\', created_unix_s=5, include_usage=True)
    for chunk in (answer.text_chunk(text), answer.first_chunk(), answer.last_chunk("stop"), answer.usage_chunk({"a": 1})):
        assert chunk.startswith(b"data: ")
        assert chunk.endswith(b"\n\n")
        assert chunk.count(b"\n") == 2
        event = json.loads(chunk[6:])
        assert (event["id"], event["model"], event["object"]) == ("chatcmpl-id", 'm"\\', "chat.completion.chunk")
    event = json.loads(answer.text_chunk(text)[6:])
    assert event["choices"][0]["delta"] == {"content": text}
    assert event["usage"] is None


def test_completions_have_their_own_shape() -> None:
    answer = CompletionAnswer("id", model="m", created_unix_s=5, include_usage=False)
    assert answer.first_chunk() == b""
    assert answer.usage_chunk({}) == b""
    event = json.loads(answer.text_chunk("x")[6:])
    assert event["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}]
    choice = OutputPiece("xy", (1, 2), "length")
    whole = json.loads(answer.whole([choice], usage(num_prompt_tokens=1, num_output_tokens=2, num_cached_tokens=1)))
    assert whole["choices"] == [{"index": 0, "text": "xy", "logprobs": None, "finish_reason": "length"}]
    assert whole["usage"]["total_tokens"] == 3
    assert whole["id"] == "cmpl-id"


def test_errors_have_openais_shape() -> None:
    unknown = NotFoundError("no such model", param="model")
    assert error_object(unknown) == {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }
    assert error_status(unknown) == 404
    assert error_status(OverloadedError("full")) == 429
