"""Constraints on outputs, as requests ask for them over HTTP and gRPC."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import InvalidRequestError
from headrace.v1 import common_pb2 as common
from services.router.generation import CONSTRAINT_KINDS, Constraint
from tests.unit.router.test_request_fields import over_grpc, over_http

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "ü"}}}
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"const":"ü"}}}'
TAG = {"type": "structural_tag", "format": {"type": "any_text"}}


def _format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA} | fields}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object", "", "response_format")),
        (_format(), Constraint("json_schema", TEXT, "response_format.json_schema.schema")),
        (_format(strict=True, description="d"), Constraint("json_schema", TEXT, "response_format.json_schema.schema")),
        (
            {"response_format": TAG},
            Constraint("structural_tag", '{"type":"structural_tag","format":{"type":"any_text"}}', "response_format"),
        ),
        ({"guided_json": SCHEMA}, Constraint("json_schema", TEXT, "guided_json")),
        ({"guided_json": TEXT}, Constraint("json_schema", TEXT, "guided_json")),
        ({"guided_regex": "a+"}, Constraint("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, Constraint("choice", '["a","b"]', "guided_choice")),
        ({"guided_grammar": "root ::= x"}, Constraint("ebnf", "root ::= x", "guided_grammar")),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, Constraint("json_schema", TEXT, "structured_outputs.json")),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object", "", "structured_outputs.json_object")),
        ({"structured_outputs": {"json_object": False, "regex": "a"}}, Constraint("regex", "a", "structured_outputs.regex")),
        ({"structured_outputs": {"choice": ["a"]}}, Constraint("choice", '["a"]', "structured_outputs.choice")),
        ({"structured_outputs": {"grammar": "g"}}, Constraint("ebnf", "g", "structured_outputs.grammar")),
        ({"structured_outputs": {"structural_tag": "{}"}}, Constraint("structural_tag", "{}", "structured_outputs.structural_tag")),
        ({"guided_regex": "a", "response_format": {"type": "text"}}, Constraint("regex", "a", "guided_regex")),
    ],
)
def test_a_constraint_is_taken_from_the_request(fields: dict[str, Any], constraint: Constraint | None) -> None:
    assert over_http(**fields).constraint == constraint


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "an object"),
        ({"response_format": {}}, "response_format.type", "one of text, json_object"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "got 'yaml'"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unknown field"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "an object"),
        (_format(name=""), "response_format.json_schema.name", "1 to 64 characters"),
        (_format(name=None), "response_format.json_schema.name", "1 to 64 characters"),
        (_format(strict="yes"), "response_format.json_schema.strict", "true or false"),
        (_format(description=3), "response_format.json_schema.description", "a string"),
        (_format(schema=None), "response_format.json_schema.schema", "a JSON schema"),
        (_format(schema=[]), "response_format.json_schema.schema", "a JSON schema"),
        (_format(other=1), "response_format.json_schema.other", "unknown field"),
        ({"guided_regex": ""}, "guided_regex", "a non-empty string"),
        ({"guided_choice": "a"}, "guided_choice", "an array of strings"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "an array of strings"),
        ({"guided_grammar": 3}, "guided_grammar", "a non-empty string"),
        ({"structured_outputs": []}, "structured_outputs", "an object"),
        ({"structured_outputs": {"yaml": 1}}, "structured_outputs.yaml", "unknown field"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true or false"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "left out where structured_outputs.json"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "left out where guided_json is given"),
        (_format() | {"guided_regex": "a"}, "guided_regex", "left out where response_format.json_schema.schema is given"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        over_http(**fields)
    assert refused.value.param == param
    assert words in refused.value.message


@pytest.mark.parametrize("kind", CONSTRAINT_KINDS)
def test_grpc_takes_every_kind(kind: str) -> None:
    source = "" if kind == "json_object" else "source"
    asked = over_grpc(constraint=common.Constraint(kind=f"CONSTRAINT_KIND_{kind.upper()}", source=source))
    assert asked.constraint == Constraint(kind, source, "constraint")


@pytest.mark.parametrize(
    ("constraint", "param", "words"),
    [
        (common.Constraint(source="a"), "constraint.kind", "one of json_schema"),
        (common.Constraint(kind=common.CONSTRAINT_KIND_GRAMMAR, source="a"), "constraint.kind", "one of json_schema"),
        (common.Constraint(kind=99, source="a"), "constraint.kind", "got '99'"),
        (common.Constraint(kind=common.CONSTRAINT_KIND_REGEX), "constraint.source", "given, unless"),
        (common.Constraint(kind=common.CONSTRAINT_KIND_JSON_OBJECT, source="{}"), "constraint.source", "given, unless"),
    ],
)
def test_grpc_refuses_what_is_wrong(constraint: common.Constraint, param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        over_grpc(constraint=constraint)
    assert refused.value.param == param
    assert words in refused.value.message
