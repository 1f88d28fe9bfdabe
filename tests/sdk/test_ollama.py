"""Ollama's own Python client against the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
TURNS = [{"role": "user", "content": "What is the capital of Japan?"}]
OPTIONS: dict[str, Any] = {"temperature": 0, "num_predict": 32}


@pytest.fixture
def client(server: Server) -> Iterator[ollama.Client]:
    made = ollama.Client(host=server.http, timeout=120)
    yield made
    made._client.close()


def test_a_chat_is_answered_whole_and_streamed_alike(client: ollama.Client) -> None:
    whole = client.chat(MODEL, TURNS, options=OPTIONS)
    assert "Tokyo" in (whole.message.content or "")
    assert (whole.done, whole.done_reason) in ((True, "stop"), (True, "length"))
    assert whole.eval_count
    assert whole.total_duration
    parts = list(client.chat(MODEL, TURNS, options=OPTIONS, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert parts[-1].eval_count == whole.eval_count
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_a_prompt_is_continued_raw_or_answered(client: ollama.Client) -> None:
    answered = client.generate(MODEL, "What is the capital of Japan?", options=OPTIONS)
    assert "Tokyo" in (answered.response or "")
    raw = client.generate(f"{MODEL}:latest", "The capital of France is", raw=True, options={**OPTIONS, "num_predict": 4})
    assert "Paris" in (raw.response or "")
    assert raw.done_reason == "length"
    streamed = client.generate(MODEL, "The capital of France is", raw=True, options={**OPTIONS, "num_predict": 4}, stream=True)
    assert "".join(part.response or "" for part in streamed) == raw.response


def test_models_are_listed_and_shown(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == [MODEL]
    assert [model.model for model in client.ps().models] == [MODEL]
    shown = client.show(MODEL)
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.context_length"] == 8192
    assert "completion" in (shown.capabilities or [])


def test_errors_are_the_clients_own(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as refused:
        client.chat("nope", TURNS)
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"options\.temperature must be in"):
        client.chat(MODEL, TURNS, options={"temperature": 9})


def test_an_answer_keeps_to_its_schema(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat(MODEL, TURNS, format=schema, options={"temperature": 0, "num_predict": 64})
    assert isinstance(json.loads(answer.message.content or "")["city"], str)


def test_logprobs_are_told(client: ollama.Client) -> None:
    answer = client.chat(MODEL, TURNS, options={**OPTIONS, "num_predict": 4}, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == answer.eval_count
    for one in answer.logprobs:
        assert one.logprob <= 0
        assert len(one.top_logprobs or ()) == 2
