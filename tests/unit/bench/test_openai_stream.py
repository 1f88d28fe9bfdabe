"""What is sent, and what each kind of streamed chunk does to the record."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.serve.openai_stream import ChunkError, Endpoint, Sampling, apply_chunk, request_body
from bench.serve.records import RequestRecord, RequestSpec


def applied(*chunks: dict[str, Any]) -> RequestRecord:
    record = RequestRecord(index=0, started_ns=0)
    for now_ns, chunk in enumerate(chunks, start=1):
        apply_chunk(record, json.dumps(chunk).encode(), now_ns=now_ns)
    return record


@pytest.mark.parametrize(
    "choice",
    [
        {"text": "a"},
        {"delta": {"content": "a"}},
        {"delta": {"reasoning_content": "a"}},
        {"delta": {"reasoning": "a"}},
        {"delta": {"tool_calls": [{"index": 0}]}},
    ],
)
def test_every_form_of_output_text_is_a_chunk(choice: dict[str, Any]) -> None:
    assert applied({"choices": [choice]}).chunk_times_ns == [1]


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [{"delta": None}]},
        {"choices": [{"text": ""}]},
        {"choices": []},
        {"choices": None, "usage": None},
    ],
)
def test_a_chunk_without_text_is_no_token(chunk: dict[str, Any]) -> None:
    assert applied(chunk).chunk_times_ns == []


def test_usage_and_finish_reason_are_kept() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    record = applied(
        {"choices": [{"text": "a", "finish_reason": None}]},
        {"choices": [{"text": "b", "finish_reason": "length"}]},
        {"choices": [], "usage": usage},
    )
    assert (record.usage_prompt_tokens, record.num_output_tokens, record.usage_cached_tokens) == (7, 2, 4)
    assert record.finish_reason == "length"
    assert record.chunk_times_ns == [1, 2]


def test_without_usage_chunks_are_counted() -> None:
    assert applied({"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}).num_output_tokens == 2


def test_the_text_of_a_completion_is_kept_and_is_in_no_result() -> None:
    record = applied({"choices": [{"text": "se"}]}, {"choices": [{"text": "cret"}]}, {"choices": [{"text": ""}]})
    assert record.text == "secret"
    assert "secret" not in json.dumps(record.as_json(origin_ns=0))


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"{oops", "bad_chunk", "not JSON"),
        (b"[1]", "bad_chunk", "not an object"),
        (b'{"choices": [3]}', "bad_chunk", "no list of objects"),
        (b'{"choices": {"text": "a"}}', "bad_chunk", "no list of objects"),
        (b'{"error": {"message": "lost"}}', "stream_error", "lost"),
        (b'{"error": "plain"}', "stream_error", "plain"),
    ],
)
def test_a_bad_chunk_or_an_error_object_is_an_error(data: bytes, kind: str, says: str) -> None:
    with pytest.raises(ChunkError, match=says) as caught:
        apply_chunk(RequestRecord(index=0, started_ns=0), data, now_ns=1)
    assert caught.value.kind == kind


def test_a_plain_prompt_becomes_a_user_message_for_chat_and_stays_text_otherwise() -> None:
    spec = RequestSpec(index=0, prompt="hello", num_output_tokens=9)
    chat = json.loads(request_body(Endpoint.CHAT, Sampling(model="m"), spec))
    assert chat["messages"] == [{"role": "user", "content": "hello"}]
    text = json.loads(request_body(Endpoint.COMPLETIONS, Sampling(model="m"), spec))
    assert text == {
        "model": "m",
        "prompt": "hello",
        "max_tokens": 9,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_ignore_eos_is_sent_only_when_asked_for() -> None:
    spec = RequestSpec(index=0, prompt="hello", num_output_tokens=9)
    assert json.loads(request_body(Endpoint.CHAT, Sampling(model="m", ignore_eos=True), spec))["ignore_eos"] is True


def test_messages_cannot_go_to_the_completions_endpoint() -> None:
    spec = RequestSpec(index=0, prompt=[{"role": "user", "content": "x"}], num_output_tokens=1)
    with pytest.raises(ValueError, match="not messages"):
        request_body(Endpoint.COMPLETIONS, Sampling(model="m"), spec)
