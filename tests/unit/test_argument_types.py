"""Which arguments of a tool are strings, told from schemas of every form."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.argument_types import ANY, NULL, OTHER, STRING, argument_types
from headrace.json_pointer import referred

DEFINITIONS: dict[str, Any] = {
    "text": {"$ref": "#/$defs/a~1b"},
    "a/b": {"type": "string", "minLength": 1},
    "loop": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/loop"}]},
    "list": [{"type": "null"}],
}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {STRING}),
        ({"type": "integer"}, {OTHER}),
        ({"type": ["string", "null"]}, {STRING, NULL}),
        ({"type": ["string", "integer"]}, {STRING, OTHER}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {STRING, NULL}),
        ({"oneOf": [{"const": "a"}, {"$ref": "#/$defs/list/0"}]}, {STRING, NULL}),
        ({"anyOf": [{"type": "string"}, {}]}, ANY),
        ({"enum": ["1", "true"]}, {STRING}),
        ({"enum": ["1", None]}, {STRING, NULL}),
        ({"enum": ["1", 1]}, {STRING, OTHER}),
        ({"type": "string", "enum": [1, 2]}, {STRING}),
        ({"type": ["string", "null"], "enum": ["a"]}, {STRING}),
        ({"allOf": [{"type": ["string", "null"]}, {"type": ["string", "integer"]}]}, {STRING}),
        ({"$ref": "#/$defs/text"}, {STRING}),
        ({"$ref": "#/$defs/loop"}, ANY),
        ({"$ref": "#/$defs/none"}, ANY),
        ({"$ref": 3, "type": 3, "anyOf": 3, "enum": 3}, ANY),
        ({"anyOf": [], "enum": []}, ANY),
        ({}, ANY),
        (True, ANY),
    ],
)
def test_the_types_of_an_argument(schema: Any, types: set[str]) -> None:
    assert argument_types({"properties": {"a": schema}, "$defs": DEFINITIONS}) == {"a": types}


def test_a_schema_that_is_elsewhere_is_found() -> None:
    root = {"$ref": "#/$defs/args", "$defs": {"args": {"properties": {"a": {"type": "string"}}}}}
    assert argument_types(root) == {"a": {STRING}}
    for broken in (None, 3, {}, {"properties": [1]}, {"$ref": "#"}, {"$ref": "http://x"}):
        assert argument_types(broken) == {}
    assert referred({"a": [1]}, "#/a/1") is None


def test_what_refers_to_itself_many_times_over_ends() -> None:
    """Each definition is read once: followed anew at every place these would be read 2**40 times."""
    definitions: dict[str, Any] = {str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)}
    definitions["40"] = {"type": "string"}
    assert argument_types({"properties": {"a": {"$ref": "#/$defs/20"}}, "$defs": definitions}) == {"a": {STRING}}
    deep = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(5000)}
    assert argument_types({"properties": {"a": {"$ref": "#/$defs/0"}}, "$defs": deep}) == {"a": ANY}
