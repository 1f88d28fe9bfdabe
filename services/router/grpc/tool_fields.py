"""Tools, tool calls and template variables of gRPC messages: JSON in fields of text. Pure.

Their shapes are OpenAI's, so they are checked by the same types as over HTTP.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from services.router.generation import Tool, ToolCall, ToolChoice
from services.router.http.openai_messages import ToolShape, tool_of
from services.router.http.validation import Body
from services.router.limits import check_depth, refuse
from services.router.tools import checked_template_kwargs

_NAMED: Final = "function:"
_CHOICES: Final = {"auto": ToolChoice(), "none": ToolChoice("none"), "required": ToolChoice("required")}


class _Function(Body):
    name: str
    arguments: str


class _Call(Body):
    id: str
    type: str = "function"
    function: _Function


_TOOLS: Final = TypeAdapter(list[ToolShape])
_CALLS: Final = TypeAdapter(list[_Call])


def tool_choice(choice: str) -> ToolChoice:
    """What the model must do with its tools."""
    if choice.startswith(_NAMED):
        return ToolChoice("named", choice.removeprefix(_NAMED))
    if choice not in _CHOICES:
        refuse("tool_choice", "auto, none, required, or function: and a name", choice)
    return _CHOICES[choice]


def tools_of(text: str, path: str) -> tuple[Tool, ...]:
    """Tools of a conversation."""
    return tuple(tool_of(tool.function) for tool in _validated(_TOOLS, text, path))


def calls_of(text: str, path: str) -> tuple[ToolCall, ...]:
    """Calls of an assistant's turn."""
    return tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in _validated(_CALLS, text, path))


def template_kwargs_of(text: str, path: str) -> dict[str, Any]:
    """Further variables for the template."""
    value = _loaded(text, path) if text else {}
    if not isinstance(value, dict):
        refuse(path, "a JSON object", value)
    return checked_template_kwargs(path, value)


def _validated(adapter: TypeAdapter[Any], text: str, path: str) -> Any:
    if not text:
        return ()
    try:
        return adapter.validate_python(_loaded(text, path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([path, *(str(part) for part in first["loc"])])
        refuse(place, first["msg"].removeprefix("Input should be "), first["input"])


def _loaded(text: str, path: str) -> Any:
    try:
        value = json.loads(text)
        # A lone surrogate would be no text further on.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        refuse(path, "valid JSON", text)
    check_depth(path, value)
    return value
