"""Priority, cache salt and number of choices, over HTTP and gRPC alike."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from headrace.errors import InvalidRequestError
from headrace.v1 import inference_pb2 as inference
from headrace.v1 import tokenizer_pb2 as tokenizer
from services.router.generation import GenerationRequest
from services.router.grpc import conversions
from services.router.http import openai


def over_http(**fields: Any) -> GenerationRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return openai.parse_chat(orjson.dumps(body)).generation


def over_grpc(**fields: Any) -> GenerationRequest:
    if "n" in fields:
        fields["num_choices"] = fields.pop("n")
    turns = tokenizer.ChatPrompt(messages=[tokenizer.ChatMessage(role="user", content="hi")])
    return conversions.chat_request(inference.ChatRequest(prompt=turns, **fields))


@pytest.mark.parametrize("ask", [over_http, over_grpc])
def test_they_are_taken_from_the_request(ask: Any) -> None:
    asked = ask(priority=-7, cache_salt="mine", n=3)
    assert (asked.priority, asked.cache_salt, asked.num_choices) == (-7, "mine", 3)
    asked = ask()
    assert (asked.priority, asked.cache_salt, asked.num_choices) == (0, "", 1)


@pytest.mark.parametrize("ask", [over_http, over_grpc])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"priority": 101}, "priority must be between -100 and 100; got 101"),
        ({"priority": -101}, "priority must be between -100 and 100; got -101"),
        ({"cache_salt": ""}, "cache_salt must be a string of 1 to 256 characters; got ''"),
        ({"cache_salt": "x" * 257}, "cache_salt must be a string of 1 to 256 characters"),
        ({"n": 0}, "{n} must be in [1, 128]; got 0"),
        ({"n": 129}, "{n} must be in [1, 128]; got 129"),
    ],
)
def test_bad_values_are_named(ask: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ask(**fields)
    num_choices = "n" if ask is over_http else "num_choices"
    assert refused.value.message.startswith(message.replace("{n}", num_choices))
    assert refused.value.param == {"n": num_choices}.get(next(iter(fields)), next(iter(fields)))


@pytest.mark.parametrize("fields", [{"priority": "high"}, {"priority": 1.5}, {"cache_salt": 3}])
def test_wrong_types_are_refused_over_http(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        over_http(**fields)
    assert refused.value.param == next(iter(fields))
