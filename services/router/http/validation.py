"""Turns a body into a checked shape, or refuses it; the one place where every protocol's requests are refused. Pure.

A shape is a pydantic model without conversions. One error is told, and it names the field by its path in the body, what it must
be, and what came. An unknown field is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from headrace.errors import InvalidRequestError
from services.router.limits import MAX_DEPTH, check_depth, shown

_Model = TypeVar("_Model", bound=BaseModel)
_NO_UNIONS: Mapping[str, str] = {}
_NAMES_DEPTH_MAX = 4


class Body(BaseModel):
    """A shape of a body, or of a part of one: no conversions, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def load_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
        InvalidRequestError: It holds something else, or a field of it is nested too deeply.
    """
    if not body:
        raise InvalidRequestError("the body is empty; send a JSON object")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body must be a JSON object; got {shown(value)}")
    # Who has no more brackets than that has no more levels: most bodies need no look.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH:
        for name, field in value.items():
            check_depth(name, field)
    return value


def drop_unused(
    body: dict[str, Any], table: Mapping[str, tuple[object, ...]], *, ignored: frozenset[str] = frozenset(), path: str = ""
) -> dict[str, Any]:
    """The body without what is ignored, and without fields that ask for nothing.

    Args:
        body: An object of the request.
        table: Fields that are known and not served, with the values at which they ask for nothing.
        ignored: Fields without effect here.
        path: Where the object stands in the request, with a dot behind it.

    Raises:
        InvalidRequestError: A field of the table asks for something.
    """
    kept = {}
    for name, value in body.items():
        if name in table:
            require_unused(path + name, value, table[name])
        elif name not in ignored:
            kept[name] = value
    return kept


def require_unused(param: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse a value that asks for something not served."""
    for option in allowed:
        # True == 1 and False == 0 in Python, but not for a client that asks for log probabilities with 0.
        if value == option and isinstance(value, bool) == isinstance(option, bool):
            return
    options = " or ".join(orjson.dumps(option).decode() for option in allowed)
    raise InvalidRequestError(f"{param} is not supported yet: leave it out or send {options}; got {shown(value)}", param=param)


def validate(
    shape: type[_Model], body: dict[str, Any], *, also_known: Iterable[str] = (), unions: Mapping[str, str] = _NO_UNIONS
) -> _Model:
    """The body as its shape.

    Args:
        shape: What it must look like.
        body: The object that came.
        also_known: Further names to suggest for a misspelt field.
        unions: By the last name of a field that takes several types, what it must be, in words.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    try:
        return shape.model_validate(body)
    except ValidationError as error:
        _refuse_first(error, shape, body, also_known, unions)


def _refuse_first(
    error: ValidationError, shape: type[BaseModel], body: object, also_known: Iterable[str], unions: Mapping[str, str]
) -> NoReturn:
    """One error is enough for a client; an unknown field comes first, since it often explains a missing one."""
    errors = error.errors(include_url=False)
    unknown = [item for item in errors if item["type"] == "extra_forbidden"]
    # Of a field that takes several types, the error that is deepest in the body tells most.
    first = max(unknown or errors, key=lambda item: len(field_path(item["loc"], body)))
    location = field_path(first["loc"], body)
    is_deep = first["type"] == "extra_forbidden" or first["type"].startswith("union_tag")
    if not is_deep and len(location) > 1 and location[-1].isdigit() and location[-2] in unions:
        # An item of the wrong type: what the field takes is told as a whole.
        location.pop()
    param = ".".join(location)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], [*_names(shape), *also_known], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidRequestError(f"unknown field {param}{hint}", param=param)
    if first["type"] == "missing":
        raise InvalidRequestError(f"{param} is required", param=param)
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        _refuse_tag(param, first)
    expected = unions.get(location[-1]) or _expectation(first["msg"])
    raise InvalidRequestError(f"{param} must be {expected}; got {shown(_value_at(location, body, first['input']))}", param=param)


def _refuse_tag(param: str, error: ErrorDetails) -> NoReturn:
    """An object whose `type` says what it is, and says nothing known."""
    context = error["ctx"]
    name = str(context["discriminator"]).strip("'")
    if error["type"] == "union_tag_not_found":
        raise InvalidRequestError(f"{param}.{name} is required", param=f"{param}.{name}")
    tags = str(context["expected_tags"]).replace("'", "")
    raise InvalidRequestError(f"{param}.{name} must be one of {tags}; got {shown(context['tag'])}", param=f"{param}.{name}")


def field_path(location: Sequence[int | str], body: object) -> list[str]:
    """An error's location without the names of union members, which pydantic puts between those of fields."""
    path: list[str] = []
    here = body
    for index, part in enumerate(location):
        following = location[index + 1] if index + 1 < len(location) else None
        is_member = following is not None and _holds(here, following) and not _holds(_step(here, part), following)
        if _holds(here, part) and not is_member:
            here = _step(here, part)
            path.append(str(part))
        elif index == len(location) - 1 and isinstance(here, dict) and isinstance(part, str):
            # A missing field. A member's name comes last only where the value is no object.
            path.append(part)
    return path or [str(location[-1])]


def _holds(value: object, part: object) -> bool:
    if isinstance(value, dict):
        return isinstance(part, str) and part in value
    return isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value)


def _step(value: Any, part: Any) -> object:
    return value[part] if _holds(value, part) else None


def _value_at(path: Sequence[str], body: Any, otherwise: object) -> object:
    for part in path:
        key = int(part) if isinstance(body, list) and part.isdigit() else part
        if not _holds(body, key):
            return otherwise
        body = body[key]
    return body


def _names(shape: type[BaseModel], depth: int = 0) -> set[str]:
    """Field names of a shape and of the shapes inside it."""
    found = {field.alias or name for name, field in shape.model_fields.items()}
    if depth < _NAMES_DEPTH_MAX:
        for field in shape.model_fields.values():
            for inner in _shapes_in(field.annotation):
                found |= _names(inner, depth + 1)
    return found


def _shapes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [shape for part in getattr(annotation, "__args__", ()) for shape in _shapes_in(part)]


def _expectation(message: str) -> str:
    text = message.removeprefix("Input should be ")
    return text if text != message else message[:1].lower() + message[1:]


@contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals of the checks that all protocols share, in the words of a protocol that names a field otherwise."""
    try:
        yield
    except InvalidRequestError as error:
        name = names.get(error.param or "")
        if name is None:
            raise
        raise type(error)(error.message.replace(str(error.param), name, 1), param=name) from None
