"""JSON schemas made by a seeded program, over the features that people use: the material of tests and measurements.

Each schema is satisfiable, uses several features at once, and names which. Sizes are bounded, so that most outputs fit in a few
hundred tokens. The same seed gives the same schemas.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

Schema = dict[str, Any]

_NAMES: Final = (
    "name", "age", "title", "city", "street", "zip_code", "tags", "price", "active", "id", "kind", "notes", "größe", "名前", "créé",
    "score", "items", "author", "email", "date", "x-y", "a b", "quote\"d", "back\\slash", "emoji 😀", "status", "parent", "count",
)  # fmt: skip
_WORDS: Final = (
    "red",
    "green",
    "blue",
    "north",
    "south",
    "naïve",
    "日本",
    "ok",
    "not found",
    'a"b',
    "tab\there",
    "",
    "0",
    "null",
    "😀",
)
_PATTERNS: Final = (
    r"^[A-Z]{2}[0-9]{3}$", r"^[a-z]+(-[a-z]+){0,3}$", r"^[0-9]{5}(-[0-9]{4})?$", r"^#[0-9a-f]{6}$", r"^(red|green|blue)$",
    r"^v[0-9]+\.[0-9]+$",
    r"^[^\s@]{1,10}@[a-z]{2,8}\.(com|org)$", r"^.{3,12}$", r"^(Mr|Ms|Dr)\. [A-Z][a-z]{1,9}$",
)  # fmt: skip
_FORMATS: Final = ("date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_DEPTH_MAX: Final = 3


@dataclass
class Case:
    """A schema and the features it uses."""

    schema: Schema
    features: set[str] = field(default_factory=set)


def cases(num: int, seed: int = 0) -> Iterator[Case]:
    """That many schemas. Every third is of one feature alone at its root, the others are objects of several."""
    for index in range(num):
        maker = _Maker(random.Random(f"{seed}-{index}"))
        yield maker.single(index // 3) if index % 3 == 0 else maker.compound()


class _Maker:
    """Makes one schema."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._features: set[str] = set()
        self._definitions: dict[str, Schema] = {}

    def single(self, index: int) -> Case:
        """A schema whose root is of one kind."""
        make = _KINDS[index % len(_KINDS)]
        return self._finish(make(self, 1))

    def compound(self) -> Case:
        """An object of several kinds of values."""
        return self._finish(self.object(0))

    def _finish(self, schema: Schema) -> Case:
        if self._definitions:
            schema = {"$defs": self._definitions, **schema}
        if self._rng.random() < 0.3:
            schema = {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": "Answer",
                "description": "An answer.",
                **schema,
            }
            self._use("annotations")
        return Case(schema, self._features)

    def _use(self, feature: str) -> None:
        self._features.add(feature)

    def value(self, depth: int) -> Schema:
        """Any schema; only plain ones far down."""
        kinds = _PLAIN if depth >= _DEPTH_MAX else _KINDS
        return self._rng.choice(kinds)(self, depth)

    def string(self, depth: int) -> Schema:
        schema: Schema = {"type": "string"}
        match self._rng.randrange(4):
            case 0:
                self._use("length")
                least = self._rng.randrange(0, 6)
                schema |= {"minLength": least, "maxLength": least + self._rng.randrange(1, 30)}
            case 1:
                self._use("pattern")
                schema["pattern"] = self._rng.choice(_PATTERNS)
            case 2:
                self._use("format")
                schema["format"] = self._rng.choice(_FORMATS)
            case _:
                self._use("length")
                schema["maxLength"] = self._rng.randrange(3, 60)
        return schema

    def integer(self, depth: int) -> Schema:
        self._use("integer range")
        least = self._rng.randrange(-1000, 1000)
        schema: Schema = {"type": "integer", "minimum": least, "maximum": least + self._rng.randrange(0, 5000)}
        if self._rng.random() < 0.25:
            schema["exclusiveMaximum"] = schema.pop("maximum") + 1
        elif self._rng.random() < 0.25:
            self._use("multipleOf")
            schema = {"type": "integer", "multipleOf": self._rng.choice((2, 5, 10)), "minimum": 0, "maximum": 1000}
        return schema

    def number(self, depth: int) -> Schema:
        self._use("number range")
        least = round(self._rng.uniform(-50, 50), 2)
        return {"type": "number", "minimum": least, "maximum": round(least + self._rng.uniform(1, 100), 2)}

    def boolean(self, depth: int) -> Schema:
        return {"type": "boolean"}

    def enum(self, depth: int) -> Schema:
        self._use("enum")
        values: list[Any] = self._rng.sample(_WORDS, self._rng.randrange(1, 6))
        if self._rng.random() < 0.4:
            values += self._rng.sample([0, 1, -3, 2.5, None, True, [1, "a"], {"k": 1}], 2)
        return {"enum": values}

    def const(self, depth: int) -> Schema:
        self._use("const")
        return {"const": self._rng.choice([*_WORDS, 42, None, False, ["a", 1], {"deep": {"er": [None]}}])}

    def nullable(self, depth: int) -> Schema:
        self._use("nullable")
        kind = self._rng.choice(("string", "integer", "boolean"))
        bound: Schema = {"string": {"maxLength": 12}, "integer": {"minimum": -9, "maximum": 99}, "boolean": {}}[kind]
        return {"type": [kind, "null"], **bound}

    def array(self, depth: int) -> Schema:
        self._use("array")
        least = self._rng.randrange(0, 3)
        schema: Schema = {"type": "array", "items": self.value(depth + 1), "minItems": least}
        return schema | {"maxItems": least + self._rng.randrange(1, 4)}

    def tuple(self, depth: int) -> Schema:
        self._use("prefixItems")
        kinds = [self.value(depth + 1) for _ in range(self._rng.randrange(1, 4))]
        return {"type": "array", "prefixItems": kinds, "items": False, "minItems": len(kinds)}

    def object(self, depth: int) -> Schema:
        self._use("object")
        names = self._rng.sample(_NAMES, self._rng.randrange(1, 5 if depth else 6))
        schema: Schema = {"type": "object", "properties": {name: self.value(depth + 1) for name in names}}
        schema["required"] = self._rng.sample(names, self._rng.randrange(0, len(names) + 1))
        if self._rng.random() < 0.7:
            self._use("additionalProperties false")
            schema["additionalProperties"] = False
        else:
            self._use("additionalProperties schema")
            schema["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 9}
        return schema

    def any_of(self, depth: int) -> Schema:
        self._use("anyOf")
        return {"anyOf": [self.value(depth + 1) for _ in range(self._rng.randrange(2, 4))]}

    def one_of(self, depth: int) -> Schema:
        """Alternatives told apart by a constant, as for a union of classes."""
        self._use("oneOf")
        kinds = self._rng.sample(("cat", "dog", "bird", "fish"), self._rng.randrange(2, 4))
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": self.plain(depth)},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                }
                for kind in kinds
            ]
        }

    def all_of(self, depth: int) -> Schema:
        self._use("allOf")
        parts = [
            {"type": "object", "properties": {name: self.plain(depth)}, "required": [name]}
            for name in self._rng.sample(("left", "right", "middle"), 2)
        ]
        return {"allOf": parts}

    def plain(self, depth: int) -> Schema:
        """A value without others inside."""
        return self._rng.choice(_PLAIN)(self, depth)

    def reference(self, depth: int) -> Schema:
        self._use("$ref")
        name = f"def{len(self._definitions)}"
        # In place before it is filled: what it holds may make definitions too.
        self._definitions[name] = {}
        self._definitions[name] = self.value(_DEPTH_MAX - 1)
        return {"$ref": f"#/$defs/{name}"}

    def recursive(self, depth: int) -> Schema:
        self._use("recursion")
        name = f"node{len(self._definitions)}"
        self._definitions[name] = {
            "type": "object",
            "properties": {
                "value": self.plain(depth),
                "children": {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 2},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
        return {"$ref": f"#/$defs/{name}"}

    def map_of(self, depth: int) -> Schema:
        self._use("patternProperties")
        return {
            "type": "object",
            "patternProperties": {"^k_[a-z]{1,4}$": self.plain(depth)},
            "additionalProperties": False,
            "maxProperties": self._rng.randrange(1, 4),
        }


_Kind = Callable[[_Maker, int], Schema]
_PLAIN: Final[tuple[_Kind, ...]] = (
    _Maker.string, _Maker.string, _Maker.integer, _Maker.number, _Maker.boolean, _Maker.enum, _Maker.const, _Maker.nullable,
)  # fmt: skip
_KINDS: Final[tuple[_Kind, ...]] = (
    _Maker.string, _Maker.integer, _Maker.number, _Maker.boolean, _Maker.enum, _Maker.const, _Maker.nullable, _Maker.array,
    _Maker.tuple, _Maker.object, _Maker.any_of, _Maker.one_of, _Maker.all_of, _Maker.reference, _Maker.recursive, _Maker.map_of,
)  # fmt: skip
