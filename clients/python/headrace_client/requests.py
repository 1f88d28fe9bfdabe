"""Arguments of calls to messages of the protos, checked on the way: names, types and ranges. What values mean the server judges."""

from __future__ import annotations

import json
import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headrace_client.types import Message, ToolCall
from headrace_client.v1 import common_pb2 as common
from headrace_client.v1 import inference_pb2 as inference
from headrace_client.v1 import tokenizer_pb2 as tokenizer

Request = inference.ChatRequest | inference.GenerateRequest

_ARGUMENTS = frozenset({"prompt", "text", "chat", "messages", "token_ids", "inputs", "sampling", "stopping"})
"""Fields that calls have arguments for, or whose own fields stand in their place."""

_JSON_FIELDS = frozenset(
    one.full_name
    for one in (
        tokenizer.ChatPrompt.DESCRIPTOR.fields_by_name["tools"],
        tokenizer.ChatPrompt.DESCRIPTOR.fields_by_name["template_kwargs"],
        common.Constraint.DESCRIPTOR.fields_by_name["source"],
    )
)
"""Text fields that hold JSON: a dict or a list is written as such."""


def chat_request(model: str, messages: Sequence[Message], fields: Mapping[str, object]) -> inference.ChatRequest:
    """A conversation's message.

    Raises:
        TypeError: There is no such field, or its value is of another type.
        ValueError: A value is out of its field's range.
    """
    request = inference.ChatRequest(model=model)
    _add_turns(request.prompt, messages)
    _fill((request, request.sampling, request.stopping, request.prompt), _seeded(fields))
    return request


def generate_request(model: str, prompt: str | Sequence[int], fields: Mapping[str, object]) -> inference.GenerateRequest:
    """A prompt's message; errors as for `chat_request`."""
    request = inference.GenerateRequest(model=model)
    _put_input(request, prompt, "prompt")
    _fill((request, request.sampling, request.stopping), _seeded(fields))
    return request


def tokenize_request(model: str, text: str | Sequence[Message], fields: Mapping[str, object]) -> inference.TokenizeRequest:
    """The message of a tokenize call; errors as for `chat_request`."""
    request = inference.TokenizeRequest(model=model)
    if isinstance(text, str):
        _put(request, "text", text, "text")
        _fill((request,), fields)
    else:
        request.chat.SetInParent()
        _add_turns(request.chat, text)
        _fill((request, request.chat), fields)
    return request


def detokenize_request(model: str, token_ids: Sequence[int], fields: Mapping[str, object]) -> inference.DetokenizeRequest:
    """The message of a detokenize call; errors as for `chat_request`."""
    request = inference.DetokenizeRequest(model=model)
    _put(request, "token_ids", token_ids, "token_ids")
    _fill((request,), fields)
    return request


def embed_request(model: str, texts: Sequence[str | Sequence[int]], fields: Mapping[str, object]) -> inference.EmbedRequest:
    """The message of an embed call; errors as for `chat_request`."""
    # A string is a sequence of strings too: each of its characters would be embedded.
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of texts; got {_shown(texts)}")
    request = inference.EmbedRequest(model=model)
    for index, text in enumerate(texts):
        _put_input(request.inputs.add(), text, f"texts.{index}")
    _fill((request,), fields)
    return request


def num_choices_of(request: Request) -> int:
    """Choices that a request asks for."""
    return request.num_choices if request.HasField("num_choices") else 1


def _seeded(fields: Mapping[str, object]) -> Mapping[str, object]:
    # Drawn here, so that a retry goes on along the same path.
    return fields if fields.get("seed") is not None else {**fields, "seed": secrets.randbits(63)}


def _put_input(place: Any, value: str | Sequence[int], path: str) -> None:
    if isinstance(value, str):
        _put(place, "text", value, path)
    else:
        place.token_ids.SetInParent()
        _put(place.token_ids, "ids", value, path)


def _add_turns(prompt: tokenizer.ChatPrompt, messages: Iterable[Message]) -> None:
    for index, turn in enumerate(messages):
        path = f"messages.{index}"
        if not isinstance(turn, Message):
            raise TypeError(f"{path} must be a Message, as made by system, user, assistant or tool; got {_shown(turn)}")
        added = prompt.messages.add()
        for name in ("role", "content", "name", "tool_call_id", "reasoning"):
            _put(added, name, getattr(turn, name), f"{path}.{name}")
        if turn.tool_calls:
            calls = [_call_of(call, f"{path}.tool_calls.{number}") for number, call in enumerate(turn.tool_calls)]
            added.tool_calls = _as_json(calls, f"{path}.tool_calls")


def _call_of(call: ToolCall, path: str) -> dict[str, object]:
    if not isinstance(call, ToolCall):
        raise TypeError(f"{path} must be a ToolCall; got {_shown(call)}")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _fill(places: tuple[Any, ...], fields: Mapping[str, object]) -> None:
    """Put fields where they belong, by the names the protos give them."""
    owners = {one.name: place for place in places for one in place.DESCRIPTOR.fields if one.name not in _ARGUMENTS}
    for name, value in fields.items():
        if name not in owners:
            raise TypeError(f"there is no field {name!r}; there are {', '.join(sorted(owners))}")
        if value is not None:
            _put(owners[name], name, value, name)


def _put(place: Any, name: str, value: Any, path: str) -> None:
    """Set a field. The path is its name in errors."""
    field = place.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated:
        _extend(getattr(place, name), field, value, path)
    elif field.message_type is not None:
        _merge(getattr(place, name), value, path)
    elif field.enum_type is not None and isinstance(value, str):
        setattr(place, name, _enum_number(field.enum_type, value, path))
    else:
        if field.full_name in _JSON_FIELDS and isinstance(value, (Mapping, list, tuple)):
            value = _as_json(value, path)
        _set_scalar(place, field, value, path)


def _set_scalar(place: Any, field: Any, value: Any, path: str) -> None:
    kind = _kind_of(field)
    # Protobuf takes a bool for a number, and a number for a bool.
    if isinstance(value, bool) != (field.cpp_type == field.CPPTYPE_BOOL):
        raise TypeError(f"{path} must be {kind}; got {_shown(value)}")
    try:
        setattr(place, field.name, value)
    except (TypeError, ValueError) as error:
        raise _same_kind(error, f"{path} must be {kind}; got {_shown(value)}") from None


def _extend(target: Any, field: Any, values: Any, path: str) -> None:
    if isinstance(values, str) and field.cpp_type == field.CPPTYPE_STRING:
        values = [values]
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{path} must be a list; got {_shown(values)}")
    if field.message_type is not None:
        for index, value in enumerate(values):
            _merge(target.add(), value, f"{path}.{index}")
        return
    try:
        target.extend(values)
    except (TypeError, ValueError) as error:
        raise _same_kind(error, f"{path} must be a list, each {_kind_of(field)}: {error}") from None


def _merge(target: Any, value: Any, path: str) -> None:
    names = target.DESCRIPTOR.fields_by_name
    if isinstance(value, type(target)):
        target.CopyFrom(value)
    elif isinstance(value, Mapping):
        target.SetInParent()
        for name, inner in value.items():
            if name not in names:
                raise TypeError(f"there is no field {name!r} in {path}; there are {', '.join(sorted(names))}")
            if inner is not None:
                _put(target, name, inner, f"{path}.{name}")
    else:
        raise TypeError(f"{path} must be a dict of {', '.join(sorted(names))}; got {_shown(value)}")


def _enum_number(enum: Any, value: str, path: str) -> int:
    """The number of a value by its name, "json_schema" as well as "CONSTRAINT_KIND_JSON_SCHEMA"."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    names: dict[str, int] = {one.name.removeprefix(prefix).lower(): one.number for one in enum.values if one.number}
    number = names.get(value.removeprefix(prefix).lower())
    if number is None:
        raise ValueError(f"{path} must be one of {', '.join(names)}; got {_shown(value)}")
    return number


def _as_json(value: Any, path: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _same_kind(error, f"{path} must be what JSON can say: {error}") from None


def _kind_of(field: Any) -> str:
    """What a field takes, in words."""
    integers = {
        field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
        field.CPPTYPE_UINT32: (0, 2**32 - 1),
        field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
        field.CPPTYPE_UINT64: (0, 2**64 - 1),
    }
    if field.cpp_type in integers:
        low, high = integers[field.cpp_type]
        return f"an integer from {low} to {high}"
    others = {field.CPPTYPE_BOOL: "a bool", field.CPPTYPE_STRING: "text", field.CPPTYPE_ENUM: "the name of a value"}
    return others.get(field.cpp_type, "a number")


def _same_kind(error: Exception, message: str) -> TypeError | ValueError:
    return TypeError(message) if isinstance(error, TypeError) else ValueError(message)


def _shown(value: object) -> str:
    """A value in an error, cut where it is long."""
    return reprlib.repr(value)
