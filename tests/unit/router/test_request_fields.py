"""Priority, cache salt, number of choices and speculation, over HTTP and gRPC alike."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from headrace.errors import InvalidRequestError
from headrace.v1 import common_pb2 as common
from headrace.v1 import inference_pb2 as inference
from headrace.v1 import tokenizer_pb2 as tokenizer
from services.router.generation import SPECULATIVE_METHODS, GenerationRequest, Speculative
from services.router.grpc import conversions
from services.router.http import openai


def over_http(**fields: Any) -> GenerationRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return openai.parse_chat(orjson.dumps(body)).generation


def over_grpc(**fields: Any) -> GenerationRequest:
    if "n" in fields:
        fields["num_choices"] = fields.pop("n")
    if "speculative" in fields:
        asked = dict(fields.pop("speculative"))
        if "method" in asked:
            name = f"SPECULATIVE_METHOD_{asked['method'].upper()}"
            asked["method"] = getattr(common, name, 9)
        fields["speculative"] = common.SpeculativeParams(**asked)
    turns = tokenizer.ChatPrompt(messages=[tokenizer.ChatMessage(role="user", content="hi")])
    return conversions.chat_request(inference.ChatRequest(prompt=turns, **fields))


@pytest.mark.parametrize("ask", [over_http, over_grpc])
def test_they_are_taken_from_the_request(ask: Any) -> None:
    asked = ask(priority=-7, cache_salt="mine", n=3)
    assert (asked.priority, asked.cache_salt, asked.num_choices) == (-7, "mine", 3)
    asked = ask()
    assert (asked.priority, asked.cache_salt, asked.num_choices) == (0, "", 1)


@pytest.mark.parametrize("ask", [over_http, over_grpc])
def test_speculation_is_taken_from_the_request(ask: Any) -> None:
    assert ask().speculative == Speculative(None, None)
    for method in SPECULATIVE_METHODS:
        assert ask(speculative={"method": method}).speculative == Speculative(method, None)
    assert ask(speculative={"num_speculative_tokens": 3}).speculative == Speculative(None, 3)
    assert ask(speculative={"method": "ngram", "num_speculative_tokens": 64}).speculative == Speculative("ngram", 64)


@pytest.mark.parametrize("ask", [over_http, over_grpc])
@pytest.mark.parametrize(
    ("speculative", "param", "message"),
    [
        ({"method": "eagle"}, "method", "speculative.method must be one of off, ngram, auto; got '"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens", "speculative.num_speculative_tokens must be in [1, 64]; got 0"),
        ({"num_speculative_tokens": 65}, "num_speculative_tokens", "speculative.num_speculative_tokens must be in [1, 64]; got 65"),
        (
            {"method": "off", "num_speculative_tokens": 2},
            "num_speculative_tokens",
            "speculative.num_speculative_tokens must be left out where speculative.method is off; got 2",
        ),
    ],
)
def test_bad_speculation_is_named(ask: Any, speculative: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ask(speculative=speculative)
    assert refused.value.message.startswith(message)
    assert refused.value.param == f"speculative.{param}"


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


@pytest.mark.parametrize("fields", [{"priority": "high"}, {"priority": 1.5}, {"cache_salt": 3}, {"speculative": "ngram"}])
def test_wrong_types_are_refused_over_http(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        over_http(**fields)
    assert refused.value.param == next(iter(fields))
