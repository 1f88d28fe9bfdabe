"""Which arguments of a tool are strings: what the tokenizer and the detokenizer must agree on where models write bare text.

`qwen3_coder`, `glm` and `minimax` write a string as it is and anything else as JSON, so that what `12` and `null` mean stands in
the argument's schema. The tokenizer's grammars and the detokenizer's parsers both ask here. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from headrace.json_pointer import referred

Types = frozenset[str]
"""Of the values that a schema allows: some of STRING, NULL and OTHER."""

STRING: Final = "string"
NULL: Final = "null"
OTHER: Final = "other"
ANY: Final[Types] = frozenset({STRING, NULL, OTHER})
TEXT: Final[Types] = frozenset({STRING})
TEXT_OR_NULL: Final[Types] = frozenset({STRING, NULL})
NULL_WORDS: Final = ("null", "None")
"""Bare texts that mean null where an argument is a string or null; templates of Python write the second."""
_MAX_DEPTH: Final = 64
"""Schemas inside one another, references followed; what is deeper may be anything."""


def argument_types(parameters: object) -> dict[str, Types]:
    """The types of each argument that a tool's schema names. Takes time in proportion to the schema, whatever it refers to."""
    types = _Types(parameters)
    properties = types.properties()
    return {name: types.of(schema) for name, schema in properties.items()}


class _Types:
    """Reads the subschemas of one schema; each reference once, and one that leads back to itself as anything."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._known: dict[str, Types] = {}

    def properties(self) -> Mapping[str, object]:
        schema = self._root
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping) or "properties" in schema or "$ref" not in schema:
                break
            schema = referred(self._root, schema["$ref"])
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return properties if isinstance(properties, Mapping) else {}

    def of(self, schema: object, depth: int = 1) -> Types:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return ANY
        found = _named(schema["type"]) if "type" in schema else ANY
        for keyword, value in schema.items():
            # What contradicts the type allows nothing; a string that no value fits is one that was meant to be.
            found = found & self._by(keyword, value, depth) or found
        return found or ANY

    def _by(self, keyword: str, value: object, depth: int) -> Types:
        if keyword == "const":
            return frozenset({_of_value(value)})
        if keyword == "enum" and isinstance(value, list):
            return frozenset(_of_value(each) for each in value)
        if keyword in ("anyOf", "oneOf") and isinstance(value, list):
            return frozenset().union(*(self.of(each, depth + 1) for each in value))
        if keyword == "allOf" and isinstance(value, list):
            return ANY.intersection(*(self.of(each, depth + 1) for each in value))
        return self._referred(value, depth) if keyword == "$ref" and isinstance(value, str) else ANY

    def _referred(self, pointer: str, depth: int) -> Types:
        if pointer not in self._known:
            self._known[pointer] = ANY
            self._known[pointer] = self.of(referred(self._root, pointer), depth + 1)
        return self._known[pointer]


def _named(value: Any) -> Types:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        return ANY
    return frozenset(name if name in (STRING, NULL) else OTHER for name in names if isinstance(name, str))


def _of_value(value: object) -> str:
    return STRING if isinstance(value, str) else NULL if value is None else OTHER
