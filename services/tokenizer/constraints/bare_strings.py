"""Strings that a model writes as bare text: of which values and lengths a schema allows them, and whether null beside. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from headrace.argument_types import NULL, STRING
from headrace.json_pointer import referred
from services.tokenizer.constraints.json_schema import MAX_DEPTH, RESTRICTING, Schema, SchemaError

_PLAIN_KEYS: Final = frozenset({"type", "enum", "const", "minLength", "maxLength"})


@dataclass(frozen=True, slots=True)
class BareString:
    """Strings of these values, or of any; with lengths in characters."""

    values: tuple[str, ...] | None = None
    min_length: int = 0
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class BareStrings:
    """What a schema of strings and null allows: any of some kinds of strings, and null."""

    kinds: tuple[BareString, ...] = ()
    has_null: bool = False


def bare_strings(schema: object, path: str, *, root: Schema, root_path: str, depth: int = 1) -> BareStrings:
    """Read a schema that allows strings, or strings and null.

    Args:
        schema: Has passed `enforceable`.
        path: Where it stands, for errors.
        root: What its references are relative to.
        root_path: Where that stands.
        depth: References and schemas round it.

    Raises:
        SchemaError: It restricts strings by more than their values and lengths.
    """
    if depth > MAX_DEPTH:
        raise SchemaError(path, f"is nested more than {MAX_DEPTH} deep, references followed")
    # A schema of true or false allows no strings alone.
    assert isinstance(schema, dict)
    keywords = RESTRICTING & set(schema)
    if len(keywords) == 1:
        (keyword,) = keywords
        inner = schema[keyword]
        if keyword == "$ref":
            target = referred(root, inner)
            return bare_strings(target, root_path + inner[1:], root=root, root_path=root_path, depth=depth + 1)
        if keyword in ("anyOf", "oneOf", "allOf") and (keyword != "allOf" or len(inner) == 1):
            members = [
                bare_strings(each, f"{path}/{keyword}/{index}", root=root, root_path=root_path, depth=depth + 1)
                for index, each in enumerate(inner)
            ]
            if keyword == "oneOf" and _may_overlap(members):
                raise SchemaError(f"{path}/oneOf", "alternatives of oneOf that may overlap cannot be enforced; use anyOf")
            return BareStrings(
                tuple(kind for member in members for kind in member.kinds), any(member.has_null for member in members)
            )
    unknown = keywords - _PLAIN_KEYS
    if unknown:
        raise SchemaError(
            f"{path}/{min(unknown)}", "cannot be enforced for a strict tool of this model, which writes strings as bare text"
        )
    return _plain(schema)


def _may_overlap(members: Sequence[BareStrings]) -> bool:
    return sum(bool(member.kinds) for member in members) > 1 or sum(member.has_null for member in members) > 1


def _plain(schema: Schema) -> BareStrings:
    named: Any = schema.get("type", [STRING, NULL])
    names = [named] if isinstance(named, str) else named
    values = schema.get("enum")
    if "const" in schema:
        values = [schema["const"]] if values is None or schema["const"] in values else []
    has_null = NULL in names and (values is None or None in values)
    if STRING not in names or (values is not None and not any(isinstance(value, str) for value in values)):
        return BareStrings((), has_null)
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if values is None:
        return BareStrings((BareString(None, least, most),), has_null)
    fitting = [value for value in values if isinstance(value, str) and least <= len(value) and (most is None or len(value) <= most)]
    return BareStrings((BareString(tuple(fitting)),), has_null)
