"""Tools of a request, the same for every protocol: what they may look like, and the grammar that makes a model call them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Final

from headrace.errors import InvalidRequestError
from services.router.generation import (
    TOOL_CALLS_KIND,
    Constraint,
    ConversationPrompt,
    GenerationRequest,
    Tool,
    ToolCallDelta,
    ToolChoice,
)
from services.router.limits import refuse

MAX_TOOLS: Final = 128
MAX_TOOL_NAME_CHARS: Final = 64
MAX_TOOL_BYTES: Final = 64 * 1024
MAX_SCHEMA_DEPTH: Final = 32
MAX_KWARGS_BYTES: Final = 16 * 1024
"""Most bytes of JSON that a client gives a chat template beside the conversation."""
MAX_FORCED_CALLS: Final = 8
"""Most calls at once that a grammar lets a model make; small ones would go on for ever."""

_RESERVED_KWARGS: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_NAME: Final = re.compile(r"[a-zA-Z0-9_.-]+")
_MISTRAL_ID_CHARS: Final = 9
_ID_CHARS: Final = 24


def with_checked_tools(request: GenerationRequest) -> GenerationRequest:
    """The request, with a grammar where it must call tools, or may and some are strict.

    Raises:
        InvalidRequestError: Its tools are too many, too large, too deep, or wrongly named; it must call one that it does not have;
            or another constraint stands beside one that makes it call.
    """
    prompt, choice = request.prompt, request.tool_choice
    tools = prompt.tools if isinstance(prompt, ConversationPrompt) else ()
    _check_tools(tools)
    if choice.kind == "named" and choice.name not in {tool.name for tool in tools}:
        raise InvalidRequestError(f"tool_choice: the function {choice.name[:80]!r} is not among the tools", param="tool_choice")
    if choice.kind == "auto" and request.constraint is None and any(tool.is_strict for tool in tools):
        return replace(request, constraint=strict_calls(tools, is_parallel=request.parallel_tool_calls))
    if choice.kind not in ("required", "named"):
        return request
    if not tools:
        raise InvalidRequestError(f"tool_choice {choice.kind} needs tools; got none", param="tool_choice")
    if request.constraint is not None:
        raise InvalidRequestError(
            f"tool_choice {choice.kind} and {request.constraint.param} both say what the output must be: leave one out",
            param="tool_choice",
        )
    return replace(request, constraint=calls_constraint(tools, choice, is_parallel=request.parallel_tool_calls))


def checked_template_kwargs(path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Further variables for a chat template.

    Raises:
        InvalidRequestError: One is the conversation's own, or is no name; or they are too large.
    """
    for name in kwargs:
        if name in _RESERVED_KWARGS or not name.isidentifier():
            refuse(f"{path}.{name}", "a variable of the template's own", name)
    num_bytes = len(json.dumps(kwargs, ensure_ascii=False).encode())
    if num_bytes > MAX_KWARGS_BYTES:
        refuse(path, f"at most {MAX_KWARGS_BYTES} bytes of JSON", f"{num_bytes} bytes")
    return kwargs


def _check_tools(tools: tuple[Tool, ...]) -> None:
    if len(tools) > MAX_TOOLS:
        refuse("tools", f"at most {MAX_TOOLS}", f"{len(tools)} of them")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        path = f"tools.{index}"
        if not _NAME.fullmatch(tool.name) or len(tool.name) > MAX_TOOL_NAME_CHARS:
            refuse(f"{path}.name", f"1 to {MAX_TOOL_NAME_CHARS} letters, digits, underscores, dots and dashes", tool.name)
        if tool.name in names:
            refuse(f"{path}.name", "a name of its own", tool.name)
        names.add(tool.name)
        if tool.parameters is not None:
            _check_schema(f"{path}.parameters", tool.parameters)
        num_bytes = len(tool.description.encode()) + len(json.dumps(tool.parameters, ensure_ascii=False).encode())
        if num_bytes > MAX_TOOL_BYTES:
            refuse(path, f"at most {MAX_TOOL_BYTES} bytes of description and parameters", f"{num_bytes} bytes")


def _check_schema(path: str, schema: Any) -> None:
    kind = schema.get("type", "object")
    if kind != "object":
        refuse(f"{path}.type", "object", kind)
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    refuse(path, f"nested at most {MAX_SCHEMA_DEPTH} deep", "one that is deeper")


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def calls_constraint(tools: tuple[Tool, ...], choice: ToolChoice, *, is_parallel: bool) -> Constraint:
    """A schema of one call or more: an array of objects with the name of a tool and arguments that fit it."""
    wanted = [tool for tool in tools if choice.kind != "named" or tool.name == choice.name]
    definitions = {tool.name: _moved(_of_object(tool.parameters or {"properties": {}}), tool.name) for tool in wanted}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/{tool.name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in wanted
    ]
    schema = {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_FORCED_CALLS if is_parallel else 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "$defs": definitions,
    }
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False), param="tools")


def strict_calls(tools: tuple[Tool, ...], *, is_parallel: bool) -> Constraint:
    """Free text, in which calls are of these tools, and those of strict ones have arguments that fit their schemas."""
    source = {
        "tools": [
            {"name": tool.name, "parameters": tool.parameters if tool.is_strict else None, "is_strict": tool.is_strict}
            for tool in tools
        ],
        "is_parallel": is_parallel,
    }
    return Constraint(TOOL_CALLS_KIND, json.dumps(source, ensure_ascii=False), param="tools")


def _of_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of arguments, which are an object whether it says so or not."""
    return {"type": "object", **schema}


def _moved(schema: Any, name: str) -> Any:
    """The schema with its references to itself as they must be where it stands as a definition."""
    if isinstance(schema, dict):
        return {
            key: f"#/$defs/{name}{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, name)
            for key, value in schema.items()
        }
    return [_moved(value, name) for value in schema] if isinstance(schema, list) else schema


def with_ids(deltas: tuple[ToolCallDelta, ...], request_id: str, tool_format: str) -> tuple[ToolCallDelta, ...]:
    """The same parts, with an id for each call that begins and has none from its model: always the same one for the same call."""
    return tuple(
        replace(delta, id=_call_id(request_id, delta.index, tool_format)) if delta.name and not delta.id else delta
        for delta in deltas
    )


def _call_id(request_id: str, index: int, tool_format: str) -> str:
    digest = blake2b(f"{request_id}:{index}".encode(), digest_size=16).hexdigest()
    # Mistral's templates take ids of nine letters and digits only.
    return digest[:_MISTRAL_ID_CHARS] if tool_format == "mistral" else "call_" + digest[:_ID_CHARS]
