"""Outputs that must follow a schema, a grammar, a choice, with the real model through all services."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import jsonschema
import openai
import pytest

from bench.structured.schemas import Case, cases
from headrace.v1.common_pb2 import CONSTRAINT_KIND_REGEX, FINISH_REASON_STOP, Constraint, SamplingParams, StoppingParams
from headrace.v1.inference_pb2 import GenerateRequest
from headrace.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
NUM_SCHEMAS = int(os.environ.get("STRUCTURED_SCHEMAS", "25"))
"""`make structured` sets 500."""
MAX_TOKENS = 160


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=150)


def ask(server: Server, content: str, **fields: Any) -> tuple[str, str]:
    """The answer, and why it ended."""
    answer = client(server).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], **({"max_tokens": MAX_TOKENS, "seed": 5} | fields)
    )
    return answer.choices[0].message.content or "", str(answer.choices[0].finish_reason)


def verdict(server: Server, case: Case) -> str:
    """What became of one schema: "valid", "length", or what is wrong."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": case.schema, "strict": True}}
    question = f"Answer in JSON by this schema: {json.dumps(case.schema, ensure_ascii=False)[:600]}"
    text, finish = ask(server, question, response_format=form)
    if finish == "length":
        return "length"
    try:
        jsonschema.Draft202012Validator(case.schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{json.dumps(case.schema)} gave {text!r}: {error}"
    return "valid"


@pytest.mark.timeout(3000 if NUM_SCHEMAS > 100 else 300)
def test_every_output_is_valid_or_cut_by_its_length(server: Server) -> None:
    """Goal: what a schema says holds. Method: schemas by a seeded program, sixteen at a time, and an independent validator."""
    with ThreadPoolExecutor(16) as pool:
        verdicts = list(pool.map(lambda case: verdict(server, case), cases(NUM_SCHEMAS)))
    wrong = [each for each in verdicts if each not in ("valid", "length")]
    print(f"{len(verdicts)} schemas: {verdicts.count('valid')} valid, {verdicts.count('length')} cut by length, {len(wrong)} wrong")
    assert not wrong
    assert verdicts.count("valid") > len(verdicts) / 2


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{(?s:.)*\}"),
        ({"extra_body": {"guided_regex": "[A-Z][a-z]{2,9} [0-9]{4}"}}, "[A-Z][a-z]{2,9} [0-9]{4}"),
        ({"extra_body": {"guided_choice": ["Paris", "Rome 2", "größer"]}}, "Paris|Rome 2|größer"),
        ({"extra_body": {"guided_grammar": 'root ::= "(" root ")" | [a-z]'}}, r"\(*[a-z]\)*"),
        ({"extra_body": {"structured_outputs": {"json": {"type": "integer", "minimum": 3, "maximum": 17}}}}, "[3-9]|1[0-7]"),
        (
            {
                "extra_body": {
                    "response_format": {
                        "type": "structural_tag",
                        "format": {
                            "type": "tag",
                            "begin": "<f>",
                            "content": {"type": "regex", "pattern": "[0-9]{3}"},
                            "end": "</f>",
                        },
                    }
                }
            },
            "<f>[0-9]{3}</f>",
        ),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_of_constraint_holds(server: Server, fields: dict[str, Any], pattern: str, temperature: float) -> None:
    text, finish = ask(server, "What is the capital of France?", temperature=temperature, **fields)
    assert finish == "length" or re.fullmatch(pattern, text), text


@pytest.mark.usefixtures("native_library")
def test_a_stream_gives_the_same_as_a_whole_answer_and_others_are_as_they_were(server: Server) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    plain = ask(server, "Name a city.", temperature=0, max_tokens=24)
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(ask, server, "Name a city.", temperature=0, max_tokens=24)
        whole, finish = ask(server, "Name a city.", temperature=0, response_format=form)
        assert beside.result() == plain
    stream = client(server).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name a city."}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        response_format=form,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == whole
    assert finish == "stop"
    assert json.loads(whole)["city"]


def test_what_cannot_be_enforced_is_refused_with_its_path(server: Server) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"properties": {"a": {"type": "array", "uniqueItems": True}}}},
    }
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, "hi", response_format=form)
    body: Any = refused.value.body
    assert body["param"] == "response_format.json_schema.schema"
    assert "#/properties/a/uniqueItems: uniqueItems cannot be enforced" in body["message"]


def test_grpc_takes_a_constraint_too(server: Server) -> None:
    with grpc.insecure_channel(server.grpc.removeprefix("grpc://")) as channel:
        request = GenerateRequest(
            text="One, two, three,",
            constraint=Constraint(kind=CONSTRAINT_KIND_REGEX, source="[0-9]{4}"),
            sampling=SamplingParams(temperature=0),
            stopping=StoppingParams(max_tokens=20),
        )
        pieces = list(InferenceStub(channel).Generate(request, timeout=WAIT_S))
    assert re.fullmatch("[0-9]{4}", "".join(piece.text for piece in pieces))
    assert pieces[-1].finish_reason == FINISH_REASON_STOP
