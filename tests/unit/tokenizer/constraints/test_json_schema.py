"""What of a client's schema is kept, and what is refused with its path."""

from __future__ import annotations

from typing import Any

import pytest

from services.tokenizer.constraints.json_schema import MAX_DEPTH, MAX_SUBSCHEMAS, MAX_VALUES, SchemaError, enforceable, subschemas


def test_what_restricts_is_kept_and_what_only_describes_has_no_effect() -> None:
    schema = {
        "type": "object",
        "title": "T",
        "properties": {
            "a": {"type": "string", "format": "password", "minLength": 2},
            "b": {"type": "string", "format": "uuid"},
            "c": {"type": "array", "items": {"enum": [1, None]}, "uniqueItems": False},
            "d": True,
        },
        "additionalProperties": False,
        "x-guidance": {"lenient": True},
    }
    kept = enforceable(schema)
    assert kept["properties"]["a"] == {"type": "string", "minLength": 2}
    assert kept["properties"]["b"] == {"type": "string", "format": "uuid"}
    assert kept["properties"]["c"] == {"type": "array", "items": {"enum": [1, None]}}
    assert kept["properties"]["d"] == {}
    assert kept["additionalProperties"] is False
    assert "x-guidance" not in kept
    assert enforceable(True) == {}


DESCRIBING: dict[str, Any] = {
    "title": "T", "description": "says", "default": 3, "example": 1, "examples": [1], "deprecated": True, "readOnly": False,
    "writeOnly": True, "$comment": "no", "contentMediaType": "text/html", "contentEncoding": "base64", "nullable": True,
    "x-order": 1, "strict": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "dialect",
    ["https://json-schema.org/draft-07/schema#", "https://spec.openapis.org/oas/3.1/dialect/base", "http://example.com/own"],
)
def test_nothing_is_left_of_what_only_describes(dialect: str) -> None:
    """At every depth; a property may still have such a name."""
    bare = {"type": "object", "properties": {"title": {"type": "string"}, "b": {"items": {"anyOf": [{"const": {"title": 1}}]}}}}
    schema = {
        **bare,
        **DESCRIBING,
        "$schema": dialect,
        "properties": {
            "title": {"type": "string", **DESCRIBING},
            "b": {"items": {"anyOf": [{"const": {"title": 1}, **DESCRIBING}]}, "$schema": dialect},
        },
    }
    assert enforceable(schema) == bare


def test_what_references_lead_to_is_kept_and_checked_wherever_it_is() -> None:
    schema = {
        "$ref": "#/components/schemas/a",
        "components": {
            "schemas": {"a": {"items": {"$ref": "#/components/more/0"}, "title": "A"}, "unused": {"not": {}}},
            "more": [{}],
        },
        "$defs": {"group": {"b": {"type": "null", "title": "B"}}, "c": {"$ref": "#/$defs/group/b"}},
    }
    assert enforceable(schema) == {
        "$ref": "#/components/schemas/a",
        "components": {"schemas": {"a": {"items": {"$ref": "#/components/more/0"}}}, "more": {"0": {}}},
        "$defs": {"group": {"b": {"type": "null"}}, "c": {"$ref": "#/$defs/group/b"}},
    }


@pytest.mark.parametrize(
    ("schema", "path", "reason"),
    [
        ([], "#", "must be an object or true"),
        (False, "#", "false allows nothing"),
        ({"properties": {"a/b": {"not": {}}}}, "#/properties/a~1b/not", "not cannot be enforced"),
        ({"items": {"uniqueItems": True}}, "#/items/uniqueItems", "uniqueItems cannot be enforced"),
        ({"anyOf": [{}, {"if": {}}]}, "#/anyOf/1/if", "if cannot be enforced"),
        ({"$defs": {"a": {"format": "regex"}}}, "#/$defs/a/format", "format regex cannot be enforced"),
        ({"properties": []}, "#/properties", "must be an object of schemas"),
        ({"anyOf": []}, "#/anyOf", "must be a non-empty array of schemas"),
        ({"enum": []}, "#/enum", "must be a non-empty array"),
        ({"items": [{}]}, "#/items", "prefixItems"),
        ({"format": 3}, "#/format", "must be a string"),
        ({"properties": {"a": 3}}, "#/properties/a", "must be an object or true"),
        ({"$ref": "http://other/schema"}, "#/$ref", "must be a pointer into the same schema"),
        ({"$ref": "#/$defs/none"}, "#/$ref", "there is no schema at #/$defs/none"),
        ({"items": {"$ref": "#/prefixItems/7"}, "prefixItems": [{}]}, "#/items/$ref", "there is no schema"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "#/$defs/a/$ref", "nothing but itself"),
        ({"$ref": "#/components/a", "components": {"a": {"not": {}}}}, "#/components/a/not", "not cannot be enforced"),
        (
            {"properties": {"a": {"type": "null"}}, "items": {"$ref": "#/properties"}},
            "#/items/$ref",
            "there is no schema at #/prop",
        ),
        ({"const": {"a": {}}, "items": {"$ref": "#/const/a"}}, "#/items/$ref", "there is no schema at #/const/a"),
        ({"enum": list(range(MAX_VALUES + 1))}, "#/enum", f"limit is {MAX_VALUES}"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_path(schema: Any, path: str, reason: str) -> None:
    with pytest.raises(SchemaError) as refused:
        enforceable(schema)
    assert refused.value.path == path
    assert reason in refused.value.reason


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_depth_and_size_have_limits() -> None:
    assert enforceable(_nested(MAX_DEPTH)) == _nested(MAX_DEPTH)
    with pytest.raises(SchemaError, match=f"nested {MAX_DEPTH + 1} deep, the limit is {MAX_DEPTH}"):
        enforceable(_nested(MAX_DEPTH + 1))
    with pytest.raises(SchemaError, match=f"the limit is {MAX_SUBSCHEMAS}"):
        enforceable({"properties": {str(index): {} for index in range(MAX_SUBSCHEMAS)}})


def test_a_recursive_schema_is_fine() -> None:
    schema = {"$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}
    assert enforceable(schema) == schema
    assert enforceable({"properties": {"c": {"$ref": "#"}}}) == {"properties": {"c": {"$ref": "#"}}}


def test_inner_schemas_come_before_those_around_them() -> None:
    schema = {"properties": {"a": {"anyOf": [{"items": {}}]}}}
    assert [path for path, _ in subschemas(schema)] == [
        "#/properties/a/anyOf/0/items",
        "#/properties/a/anyOf/0",
        "#/properties/a",
        "#",
    ]
