"""OpenAI's conversations: messages of every role, tools, and what else shapes a prompt. Pure.

The older `functions` are refused: they are `tools` under another name, and every client has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NoReturn

from headrace.errors import InvalidRequestError
from services.router.generation import ChatTurn, ConversationPrompt, Tool, ToolCall, ToolChoice
from services.router.http.validation import Body, drop_unused
from services.router.limits import refuse
from services.router.tools import checked_template_kwargs

_MESSAGE_NOT_YET: Final[Mapping[str, tuple[object, ...]]] = {
    "function_call": (None,),
    "audio": (None,),
    "annotations": (None, []),
}
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_FIELDS: Final = {
    "assistant": frozenset({"role", "content", "name", "tool_calls", "refusal", "reasoning_content", "reasoning"}),
    "tool": frozenset({"role", "content", "name", "tool_call_id"}),
}
_PLAIN_FIELDS: Final = frozenset({"role", "content", "name"})
_PARTS_NOT_YET: Final = frozenset({"image_url", "input_audio", "file", "video_url"})


class FunctionShape(Body):
    """The function of a tool."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolShape(Body):
    """A tool."""

    type: Literal["function"]
    function: FunctionShape


class FunctionName(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """A tool choice that names one."""

    type: Literal["function"]
    function: FunctionName


def refuse_functions(functions: object, function_call: object) -> None:
    """Refuse the older form of tools."""
    if functions not in (None, []):
        raise InvalidRequestError("functions is not supported: send the same functions as tools", param="functions")
    if function_call not in (None, "none", "auto"):
        raise InvalidRequestError("function_call is not supported: send tools and tool_choice", param="function_call")


def tool_choice(choice: str | NamedTool | None) -> ToolChoice:
    """What the model must do with its tools."""
    if isinstance(choice, NamedTool):
        return ToolChoice("named", choice.function.name)
    match choice:
        case "none":
            return ToolChoice("none")
        case "required":
            return ToolChoice("required")
    return ToolChoice()


def template_kwargs(kwargs: dict[str, Any] | None, reasoning_effort: str | None) -> dict[str, Any]:
    """Further variables for the template. An effort of "none" turns thinking off, where the template knows how."""
    found = checked_template_kwargs("chat_template_kwargs", dict(kwargs or {}))
    if reasoning_effort == "none":
        found.setdefault("enable_thinking", False)
    elif reasoning_effort is not None:
        found.setdefault("reasoning_effort", reasoning_effort)
    return found


def conversation(
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool | None,
    continue_final: bool | None,
    tools: list[ToolShape] | None,
    template_kwargs: Mapping[str, Any],
) -> ConversationPrompt:
    """A conversation, checked.

    Raises:
        InvalidRequestError: It names the first message and field that is wrong.
    """
    turns = tuple(_turn(f"messages.{index}", message) for index, message in enumerate(messages))
    is_continued = continue_final is True
    if is_continued and add_generation_prompt is True:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message cannot both be true", param="continue_final_message"
        )
    if is_continued and turns[-1].role != "assistant":
        refuse("continue_final_message", "false unless the last message is the assistant's", turns[-1].role)
    is_opened = not is_continued if add_generation_prompt is None else add_generation_prompt
    return ConversationPrompt(
        turns,
        add_generation_prompt=is_opened,
        continue_final_message=is_continued,
        tools=tuple(tool_of(tool.function) for tool in tools or ()),
        template_kwargs=template_kwargs,
    )


def tool_of(function: FunctionShape) -> Tool:
    """A tool as its shape says."""
    return Tool(function.name, function.description or "", function.parameters, is_strict=function.strict is True)


def _turn(path: str, message: dict[str, Any]) -> ChatTurn:
    role = message.get("role")
    if role == "function":
        raise InvalidRequestError(f"{path}.role 'function' is not supported: send role 'tool'", param=f"{path}.role")
    if not isinstance(role, str) or role not in _ROLES:
        refuse(f"{path}.role", f"one of {', '.join(_ROLES)}", role)
    message = drop_unused(message, _MESSAGE_NOT_YET, path=path + ".")
    unknown = [field for field in message if field not in _FIELDS.get(role, _PLAIN_FIELDS)]
    if unknown:
        raise InvalidRequestError(f"unknown field {path}.{unknown[0]} in a message of role {role}", param=f"{path}.{unknown[0]}")
    name = _text(path, message, "name")
    if role == "assistant":
        return _assistant_turn(path, message, name)
    if "content" not in message:
        raise InvalidRequestError(f"{path}.content is required", param=f"{path}.content")
    content = _content(f"{path}.content", message["content"])
    if role == "tool":
        if not isinstance(message.get("tool_call_id"), str):
            _require_string(path, "tool_call_id", message)
        return ChatTurn("tool", content, name, tool_call_id=message["tool_call_id"])
    return ChatTurn(_ROLES[role], content, name)


def _assistant_turn(path: str, message: dict[str, Any], name: str) -> ChatTurn:
    calls = _calls(f"{path}.tool_calls", message.get("tool_calls"))
    refusal = _text(path, message, "refusal")
    content = message.get("content")
    if content is None:
        if not calls and not refusal:
            raise InvalidRequestError(f"{path}.content is required unless tool_calls are given", param=f"{path}.content")
        content = ""
    text = _content(f"{path}.content", content) if content else ""
    reasoning = _text(path, message, "reasoning_content") or _text(path, message, "reasoning")
    # A refusal is what the assistant said instead.
    return ChatTurn("assistant", text or refusal, name, tool_calls=calls, reasoning=reasoning)


def _text(path: str, message: dict[str, Any], field: str) -> str:
    value = message.get(field)
    if value is not None and not isinstance(value, str):
        refuse(f"{path}.{field}", "a string", value)
    return value or ""


def _require_string(path: str, field: str, holder: Mapping[str, Any]) -> NoReturn:
    if field not in holder:
        raise InvalidRequestError(f"{path}.{field} is required", param=f"{path}.{field}")
    refuse(f"{path}.{field}", "a string", holder[field])


def _calls(path: str, calls: object) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list):
        refuse(path, "an array of tool calls", calls)
    return tuple(_call(f"{path}.{index}", call) for index, call in enumerate(calls))


def _call(path: str, call: object) -> ToolCall:
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(call.get("function"), dict):
        refuse(path, 'of the form {"id": …, "type": "function", "function": {"name": …, "arguments": …}}', call)
    function = call["function"]
    if not isinstance(call.get("id"), str):
        _require_string(path, "id", call)
    for field in ("name", "arguments"):
        if not isinstance(function.get(field), str):
            _require_string(f"{path}.function", field, function)
    return ToolCall(call["id"], function["name"], function["arguments"])


def _content(path: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        refuse(path, "a string or a non-empty array of text parts", content)
    return "".join(_part(f"{path}.{index}", part) for index, part in enumerate(content))


def _part(path: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _PARTS_NOT_YET:
        raise InvalidRequestError(f"{path} of type {kind} is not supported yet: send text parts only", param=path)
    field = "refusal" if kind == "refusal" else "text"
    if (
        not isinstance(part, dict)
        or kind not in ("text", "refusal")
        or set(part) != {"type", field}
        or not isinstance(part[field], str)
    ):
        refuse(path, 'of the form {"type": "text", "text": "…"}', part)
    return str(part[field])
