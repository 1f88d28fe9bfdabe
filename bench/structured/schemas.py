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
        self.rng = rng
        self._features: set[str] = set()
        self.definitions: dict[str, Schema] = {}

    def single(self, index: int) -> Case:
        """A schema whose root is of one kind."""
        make = _KINDS[index % len(_KINDS)]
        return self._finish(make(self, 1))

    def compound(self) -> Case:
        """An object of several kinds of values."""
        return self._finish(_object(self, 0))

    def _finish(self, schema: Schema) -> Case:
        if self.definitions:
            schema = {"$defs": self.definitions, **schema}
        if self.rng.random() < 0.3:
            schema = {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": "Answer",
                "description": "An answer.",
                **schema,
            }
            self.use("annotations")
        return Case(schema, self._features)

    def use(self, feature: str) -> None:
        """Note a feature."""
        self._features.add(feature)

    def value(self, depth: int) -> Schema:
        """Any schema; only plain ones far down."""
        kinds = _PLAIN if depth >= _DEPTH_MAX else _KINDS
        return self.rng.choice(kinds)(self, depth)

    def plain(self, depth: int) -> Schema:
        """A value without others inside."""
        return self.rng.choice(_PLAIN)(self, depth)


def _string(maker: _Maker, depth: int) -> Schema:
    schema: Schema = {"type": "string"}
    match maker.rng.randrange(4):
        case 0:
            maker.use("length")
            least = maker.rng.randrange(0, 6)
            schema |= {"minLength": least, "maxLength": least + maker.rng.randrange(1, 30)}
        case 1:
            maker.use("pattern")
            schema["pattern"] = maker.rng.choice(_PATTERNS)
        case 2:
            maker.use("format")
            schema["format"] = maker.rng.choice(_FORMATS)
        case _:
            maker.use("length")
            schema["maxLength"] = maker.rng.randrange(3, 60)
    return schema


def _integer(maker: _Maker, depth: int) -> Schema:
    maker.use("integer range")
    least = maker.rng.randrange(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": least, "maximum": least + maker.rng.randrange(0, 5000)}
    if maker.rng.random() < 0.25:
        schema["exclusiveMaximum"] = schema.pop("maximum") + 1
    elif maker.rng.random() < 0.25:
        maker.use("multipleOf")
        schema = {"type": "integer", "multipleOf": maker.rng.choice((2, 5, 10)), "minimum": 0, "maximum": 1000}
    return schema


def _number(maker: _Maker, depth: int) -> Schema:
    maker.use("number range")
    least = round(maker.rng.uniform(-50, 50), 2)
    return {"type": "number", "minimum": least, "maximum": round(least + maker.rng.uniform(1, 100), 2)}


def _boolean(maker: _Maker, depth: int) -> Schema:
    return {"type": "boolean"}


def _enum(maker: _Maker, depth: int) -> Schema:
    maker.use("enum")
    values: list[Any] = maker.rng.sample(_WORDS, maker.rng.randrange(1, 6))
    if maker.rng.random() < 0.4:
        values += maker.rng.sample([0, 1, -3, 2.5, None, True, [1, "a"], {"k": 1}], 2)
    return {"enum": values}


def _const(maker: _Maker, depth: int) -> Schema:
    maker.use("const")
    return {"const": maker.rng.choice([*_WORDS, 42, None, False, ["a", 1], {"deep": {"er": [None]}}])}


def _nullable(maker: _Maker, depth: int) -> Schema:
    maker.use("nullable")
    kind = maker.rng.choice(("string", "integer", "boolean"))
    bound: Schema = {"string": {"maxLength": 12}, "integer": {"minimum": -9, "maximum": 99}, "boolean": {}}[kind]
    return {"type": [kind, "null"], **bound}


def _array(maker: _Maker, depth: int) -> Schema:
    maker.use("array")
    least = maker.rng.randrange(0, 3)
    schema: Schema = {"type": "array", "items": maker.value(depth + 1), "minItems": least}
    return schema | {"maxItems": least + maker.rng.randrange(1, 4)}


def _tuple(maker: _Maker, depth: int) -> Schema:
    maker.use("prefixItems")
    kinds = [maker.value(depth + 1) for _ in range(maker.rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": kinds, "items": False, "minItems": len(kinds)}


def _object(maker: _Maker, depth: int) -> Schema:
    maker.use("object")
    names = maker.rng.sample(_NAMES, maker.rng.randrange(1, 5 if depth else 6))
    schema: Schema = {"type": "object", "properties": {name: maker.value(depth + 1) for name in names}}
    schema["required"] = maker.rng.sample(names, maker.rng.randrange(0, len(names) + 1))
    if maker.rng.random() < 0.7:
        maker.use("additionalProperties false")
        schema["additionalProperties"] = False
    else:
        maker.use("additionalProperties schema")
        schema["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 9}
    return schema


def _any_of(maker: _Maker, depth: int) -> Schema:
    maker.use("anyOf")
    return {"anyOf": [maker.value(depth + 1) for _ in range(maker.rng.randrange(2, 4))]}


def _one_of(maker: _Maker, depth: int) -> Schema:
    """Alternatives told apart by a constant, as for a union of classes."""
    maker.use("oneOf")
    kinds = maker.rng.sample(("cat", "dog", "bird", "fish"), maker.rng.randrange(2, 4))
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": maker.plain(depth)},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for kind in kinds
        ]
    }


def _all_of(maker: _Maker, depth: int) -> Schema:
    maker.use("allOf")
    parts = [
        {"type": "object", "properties": {name: maker.plain(depth)}, "required": [name]}
        for name in maker.rng.sample(("left", "right", "middle"), 2)
    ]
    return {"allOf": parts}


def _reference(maker: _Maker, depth: int) -> Schema:
    maker.use("$ref")
    name = f"def{len(maker.definitions)}"
    # In place before it is filled: what it holds may make definitions too.
    maker.definitions[name] = {}
    maker.definitions[name] = maker.value(_DEPTH_MAX - 1)
    return {"$ref": f"#/$defs/{name}"}


def _recursive(maker: _Maker, depth: int) -> Schema:
    maker.use("recursion")
    name = f"node{len(maker.definitions)}"
    maker.definitions[name] = {
        "type": "object",
        "properties": {
            "value": maker.plain(depth),
            "children": {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 2},
        },
        "required": ["value", "children"],
        "additionalProperties": False,
    }
    return {"$ref": f"#/$defs/{name}"}


def _map_of(maker: _Maker, depth: int) -> Schema:
    maker.use("patternProperties")
    return {
        "type": "object",
        "patternProperties": {"^k_[a-z]{1,4}$": maker.plain(depth)},
        "additionalProperties": False,
        "maxProperties": maker.rng.randrange(1, 4),
    }


_Kind = Callable[[_Maker, int], Schema]
_PLAIN: Final[tuple[_Kind, ...]] = (
    _string, _string, _integer, _number, _boolean, _enum, _const, _nullable,
)  # fmt: skip
_KINDS: Final[tuple[_Kind, ...]] = (
    _string, _integer, _number, _boolean, _enum, _const, _nullable, _array,
    _tuple, _object, _any_of, _one_of, _all_of, _reference, _recursive, _map_of,
)  # fmt: skip
