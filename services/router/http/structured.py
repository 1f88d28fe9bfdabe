"""What an output must be, as OpenAI's clients and vLLM's say it. Pure.

`response_format` is OpenAI's; `structured_outputs` and the `guided_*` fields are vLLM's. One of them at a time. Whether a schema
can be enforced is for the tokenizer to say; its refusals name the field given here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from headrace.errors import InvalidRequestError
from services.router.generation import Constraint
from services.router.limits import refuse

FIELDS: Final = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")

_MAX_NAME_CHARS: Final = 64


def schema_source(schema: object) -> str:
    """A JSON schema, or another value of the request, as text."""
    return orjson.dumps(schema).decode()


def constraint_of(fields: Mapping[str, Any]) -> Constraint | None:
    """The constraint that a request asks for, if any.

    Args:
        fields: Values of `FIELDS`; None where one is absent.

    Raises:
        InvalidRequestError: A field is not as it must be, or two ask for something.
    """
    found = [one for name in FIELDS if fields.get(name) is not None and (one := _PARSERS[name](fields[name])) is not None]
    if len(found) > 1:
        refuse(found[1].param, f"left out where {found[0].param} is given", "both")
    return found[0] if found else None


def _response_format(value: Any) -> Constraint | None:
    path = "response_format"
    kind = _object(value, path).get("type")
    if kind == "text":
        _only(value, path, "type")
        return None
    if kind == "json_object":
        _only(value, path, "type")
        return Constraint("json_object", param=path)
    if kind == "json_schema":
        _only(value, path, "type", "json_schema")
        return _named_schema(value.get("json_schema"), f"{path}.json_schema")
    if kind == "structural_tag":
        return Constraint("structural_tag", schema_source(value), path)
    refuse(f"{path}.type", "one of text, json_object, json_schema, structural_tag", kind)


def _named_schema(value: Any, path: str) -> Constraint:
    _only(_object(value, path), path, "name", "description", "schema", "strict")
    name = value.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= _MAX_NAME_CHARS:
        refuse(f"{path}.name", f"a string of 1 to {_MAX_NAME_CHARS} characters", name)
    if not isinstance(value.get("description"), str | None):
        refuse(f"{path}.description", "a string", value["description"])
    if not isinstance(value.get("strict"), bool | None):
        # True or false: what is asked for is enforced either way.
        refuse(f"{path}.strict", "true or false", value["strict"])
    return _schema(value.get("schema"), f"{path}.schema")


def _schema(value: Any, path: str) -> Constraint:
    if isinstance(value, str):
        return Constraint("json_schema", value, path)
    if not isinstance(value, (dict, bool)):
        refuse(path, "a JSON schema", value)
    return Constraint("json_schema", schema_source(value), path)


def _regex(value: Any, path: str) -> Constraint:
    return Constraint("regex", _string(value, path), path)


def _grammar(value: Any, path: str) -> Constraint:
    return Constraint("ebnf", _string(value, path), path)


def _choice(value: Any, path: str) -> Constraint:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        refuse(path, "an array of strings", value)
    return Constraint("choice", schema_source(value), path)


def _json_object(value: Any, path: str) -> Constraint | None:
    if not isinstance(value, bool):
        refuse(path, "true or false", value)
    return Constraint("json_object", param=path) if value else None


def _structural_tag(value: Any, path: str) -> Constraint:
    return Constraint("structural_tag", value if isinstance(value, str) else schema_source(_object(value, path)), path)


_OF_STRUCTURED: Final[dict[str, Callable[[Any, str], Constraint | None]]] = {
    "json": _schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}


def _structured_outputs(value: Any) -> Constraint | None:
    path = "structured_outputs"
    _only(_object(value, path), path, *_OF_STRUCTURED)
    given = {name: each for name, each in value.items() if each is not None}
    found = [one for name, each in given.items() if (one := _OF_STRUCTURED[name](each, f"{path}.{name}")) is not None]
    if len(found) > 1:
        refuse(found[1].param, f"left out where {found[0].param} is given", "both")
    return found[0] if found else None


_PARSERS: Final[dict[str, Callable[[Any], Constraint | None]]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": lambda value: _schema(value, "guided_json"),
    "guided_regex": lambda value: _regex(value, "guided_regex"),
    "guided_choice": lambda value: _choice(value, "guided_choice"),
    "guided_grammar": lambda value: _grammar(value, "guided_grammar"),
}


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(path, "an object", value)
    return value


def _only(value: Mapping[str, Any], path: str, *known: str) -> None:
    unknown = [name for name in value if name not in known]
    if unknown:
        raise InvalidRequestError(f"unknown field {path}.{unknown[0]}", param=f"{path}.{unknown[0]}")


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        refuse(path, "a non-empty string", value)
    return value
