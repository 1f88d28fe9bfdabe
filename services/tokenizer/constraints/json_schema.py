"""JSON schemas of clients: what of them can be enforced is kept, what cannot is refused with its path.

A schema passes only if every output that its grammar allows is valid: nothing that restricts is ever left out silently. What only
describes (titles, examples, formats that JSON Schema does not define) and what JSON Schema does not know (`x-…`, `strict`) is left
out, as it has no effect by the specification. So is OpenAPI's `nullable`: what is written without it is valid by both. A `$schema`
is read as 2020-12, whatever it names; `exclusiveMinimum: true` of draft 4 means there what it meant. Depth and size have limits.
Pure; runs in the child, see `compiler.py`.

Source: JSON Schema 2020-12, core and validation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from headrace.json_pointer import referred, steps_of

MAX_DEPTH: Final = 64
"""Subschemas inside one another."""
MAX_SUBSCHEMAS: Final = 4096
MAX_VALUES: Final = 4096
"""Values of all enums together."""

Schema = dict[str, Any]

_OF_NAMES: Final = ("properties", "patternProperties", "$defs", "definitions")
_OF_LISTS: Final = ("prefixItems", "anyOf", "allOf", "oneOf")
_OF_ONE: Final = ("items", "additionalProperties")
_PLAIN: Final = frozenset(
    {
        "const", "exclusiveMaximum", "exclusiveMinimum", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
        "minLength", "minProperties", "minimum", "multipleOf", "pattern", "required", "type",
    }
)  # fmt: skip
"""Keywords that restrict and hold no schemas; the compiler checks their values."""
RESTRICTING: Final = _PLAIN | {"$ref", "enum", "format", "patternProperties", "properties", *_OF_LISTS, *_OF_ONE}
"""All keywords of an enforceable schema; what else it has are places that references lead to."""
_UNSUPPORTED: Final = frozenset(
    {
        "$anchor", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef", "additionalItems", "contains",
        "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains", "not", "propertyNames",
        "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
    }
)  # fmt: skip
_HARMLESS: Final[dict[str, tuple[object, ...]]] = {"uniqueItems": (False,), "minContains": (0,), "additionalItems": (True, {})}
"""Values with which an unsupported keyword restricts nothing."""
_FORMATS: Final = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
_FORMATS_UNSUPPORTED: Final = frozenset(
    {
        "idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex", "relative-json-pointer", "uri-reference",
        "uri-template",
    }
)  # fmt: skip


class SchemaError(Exception):
    """What is wrong with a schema, and where: a JSON pointer into it, which begins with #."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def enforceable(schema: object) -> Schema:
    """A schema of the same meaning, without what only describes.

    Raises:
        SchemaError: It is no schema, has something that cannot be enforced, or is too deep or too large.
    """
    if schema is True:
        return {}
    walk = _Walk()
    kept = walk.subschema(schema, "#", 1)
    # Grows while it is gone through: what a reference leads to may refer further.
    for path, pointer in walk.references:
        _check_reference(schema, path, pointer)
        if pointer not in walk.paths:
            target = walk.subschema(referred(schema, pointer), pointer, 1)
            _put(kept, walk.paths - {pointer}, path, pointer, target)
    return kept


def subschemas(schema: object, path: str = "#") -> Iterator[tuple[str, Schema]]:
    """Every subschema with its path, the inner ones before those around them."""
    if not isinstance(schema, dict):
        return
    for keyword, inner in schema.items():
        if keyword in _OF_NAMES and isinstance(inner, dict):
            for name, each in inner.items():
                yield from subschemas(each, f"{path}/{keyword}/{escaped(name)}")
        elif keyword in _OF_LISTS and isinstance(inner, list):
            for index, each in enumerate(inner):
                yield from subschemas(each, f"{path}/{keyword}/{index}")
        elif keyword in _OF_ONE:
            yield from subschemas(inner, f"{path}/{keyword}")
    yield path, schema


def escaped(name: str) -> str:
    """A name as a step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


class _Walk:
    """One pass over a schema."""

    def __init__(self) -> None:
        self.references: list[tuple[str, str]] = []
        self.paths: set[str] = set()
        self._num_subschemas = 0
        self._num_values = 0

    def subschema(self, schema: object, path: str, depth: int) -> Schema:
        """A subschema's enforceable form; true is one without keywords."""
        self.paths.add(path)
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise SchemaError(path, "must be an object or true" if schema is not False else "false allows nothing")
        self._num_subschemas += 1
        if depth > MAX_DEPTH:
            raise SchemaError(path, f"is nested {depth} deep, the limit is {MAX_DEPTH}")
        if self._num_subschemas > MAX_SUBSCHEMAS:
            raise SchemaError(path, f"is subschema number {self._num_subschemas}, the limit is {MAX_SUBSCHEMAS}")
        kept: Schema = {}
        for keyword, value in schema.items():
            self._keyword(kept, keyword, value, f"{path}/{escaped(keyword)}", depth)
        return kept

    def _keyword(self, kept: Schema, keyword: str, value: Any, path: str, depth: int) -> None:
        if keyword in _UNSUPPORTED:
            if keyword != "$id" and not any(value == harmless for harmless in _HARMLESS.get(keyword, ())):
                raise SchemaError(path, f"{keyword} cannot be enforced; leave it out")
        elif keyword in _OF_NAMES:
            kept[keyword] = self._named(value, path, depth)
        elif keyword in _OF_LISTS:
            if not isinstance(value, list) or not value:
                raise SchemaError(path, "must be a non-empty array of schemas")
            kept[keyword] = [self._member(each, f"{path}/{index}", depth) for index, each in enumerate(value)]
        elif keyword in _OF_ONE:
            if isinstance(value, list):
                raise SchemaError(path, "must be one schema; a tuple's are given with prefixItems")
            kept[keyword] = self._member(value, path, depth)
        elif keyword == "format":
            self._format(kept, value, path)
        elif keyword == "$ref":
            self._reference(kept, value, path)
        elif keyword == "enum":
            if not isinstance(value, list) or not value:
                raise SchemaError(path, "must be a non-empty array")
            self._num_values += len(value)
            if self._num_values > MAX_VALUES:
                raise SchemaError(path, f"makes {self._num_values} values of all enums together, the limit is {MAX_VALUES}")
            kept[keyword] = value
        elif keyword in _PLAIN:
            kept[keyword] = value

    def _named(self, value: Any, path: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise SchemaError(path, "must be an object of schemas")
        return {name: self._member(each, f"{path}/{escaped(name)}", depth) for name, each in value.items()}

    def _member(self, value: Any, path: str, depth: int) -> Schema | bool:
        """A schema inside another, where false has its use: as what additional properties or items may be."""
        if value is False:
            self.paths.add(path)
            return False
        return self.subschema(value, path, depth + 1)

    def _format(self, kept: Schema, value: Any, path: str) -> None:
        if not isinstance(value, str):
            raise SchemaError(path, "must be a string")
        if value in _FORMATS_UNSUPPORTED:
            raise SchemaError(path, f"format {value} cannot be enforced; leave it out or give a pattern")
        if value in _FORMATS:
            kept["format"] = value

    def _reference(self, kept: Schema, value: Any, path: str) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise SchemaError(path, "must be a pointer into the same schema, such as #/$defs/name")
        self.references.append((path, value))
        kept["$ref"] = value


def _check_reference(root: object, path: str, pointer: str) -> None:
    """Follow a reference until it comes to a schema that is more than a reference."""
    seen = set()
    while True:
        if pointer in seen:
            raise SchemaError(path, f"{pointer} refers to nothing but itself")
        seen.add(pointer)
        target = referred(root, pointer)
        if not isinstance(target, (dict, bool)):
            raise SchemaError(path, f"there is no schema at {pointer}")
        if not isinstance(target, Mapping) or not isinstance(target.get("$ref"), str):
            return
        pointer = target["$ref"]


def _put(kept: Schema, paths: set[str], path: str, pointer: str, target: Schema) -> None:
    """Put what a reference leads to at its place: inside something that is no keyword, such as OpenAPI's `components`."""
    steps = steps_of(pointer)
    places = ["#" + "".join(f"/{escaped(step)}" for step in steps[:num]) for num in range(len(steps))]
    num_known = max(num for num, place in enumerate(places) if place in paths)
    if steps[num_known] in RESTRICTING or steps[num_known] in _OF_NAMES:
        raise SchemaError(path, f"there is no schema at {pointer}")
    at: Any = referred(kept, places[num_known])
    for step in steps[num_known:-1]:
        at = at.setdefault(step, {})
    at[steps[-1]] = {**at.get(steps[-1], {}), **target}
