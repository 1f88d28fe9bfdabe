"""A conversation from the wire as chat templates want it; for templates that know no tools, with tools written out. Pure.

Hugging Face's conventions: an assistant's calls are objects with `function.name` and `function.arguments`, the arguments parsed;
reasoning is `reasoning_content` (GPT-OSS reads `thinking`).

A template without tools gets them in words. The system turn (or the first user's, where the template takes no system turn) lists
them, one JSON object a line between `<tools>` and `</tools>`, and asks for calls as Hermes writes them; calls of earlier turns
stand in the assistant's text in that form, results in a user's turn between `<tool_response>` and `</tool_response>`. A model that
was not trained on tools may well not call any by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import ProtocolError
from headrace.v1.tokenizer_pb2 import ChatMessage, ChatPrompt

Turn = dict[str, Any]

_TOOLS_TEXT = """You can call functions. Those between <tools> and </tools> are described as JSON, one on each line:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as one JSON object between <tool_call> and </tool_call>, once for each call:
<tool_call>
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


def turns_of(chat: ChatPrompt) -> list[Turn]:
    """The turns of a conversation.

    Raises:
        ProtocolError: Calls are not of the wire's form.
    """
    return [_turn(message) for message in chat.messages]


def tools_of(chat: ChatPrompt) -> list[dict[str, Any]]:
    """The tools of a conversation.

    Raises:
        ProtocolError: They are not of the wire's form.
    """
    tools = _loaded(chat.tools, list, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise ProtocolError("tokenize: tools are not an array of objects")
    return list(tools)


def template_kwargs_of(chat: ChatPrompt) -> dict[str, Any]:
    """Further variables for the template.

    Raises:
        ProtocolError: They are no JSON object.
    """
    return dict(_loaded(chat.template_kwargs, dict, "template_kwargs"))


def text_of(chat: ChatPrompt) -> str:
    """All text of a conversation, for the check of its length."""
    parts = [chat.tools, chat.template_kwargs]
    for message in chat.messages:
        parts += (message.role, message.content, message.name, message.tool_calls, message.tool_call_id, message.reasoning)
    return "".join(parts)


def with_argument_texts(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with arguments of calls as JSON text, for templates that put them together with other text."""
    found = []
    for turn in turns:
        calls = turn.get("tool_calls")
        found.append({**turn, "tool_calls": [_with_text(call) for call in calls]} if calls else turn)
    return found


def with_contents(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with an empty text as the content of those that have none."""
    return [{**turn, "content": turn.get("content") or ""} for turn in turns]


def with_descriptions(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools with an empty description for those that have none."""
    return [{**tool, "function": {"description": "", **tool["function"]}} if "function" in tool else tool for tool in tools]


def with_granite_calls(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with their calls in the content as Granite 3 writes them, whose template does not show calls."""
    found = []
    for turn in turns:
        calls = ", ".join(_call_object(call) for call in turn.get("tool_calls", ()))
        plain = {key: value for key, value in turn.items() if key != "tool_calls"}
        found.append({**plain, "content": f"{turn.get('content') or ''}<|tool_call|>[{calls}]"} if calls else turn)
    return found


def written_out(turns: Sequence[Turn]) -> list[Turn]:
    """The same turns for a template without tools: only system, user and assistant turns, of text."""
    found: list[Turn] = []
    for turn in turns:
        content = turn.get("content") or ""
        if turn["role"] == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            if found and found[-1].get("is_result"):
                found[-1]["content"] += "\n" + text
            else:
                found.append({"role": "user", "content": text, "is_result": True})
            continue
        calls = [_written_call(call) for call in turn.get("tool_calls", ())]
        plain = {key: value for key, value in turn.items() if key not in ("tool_calls", "tool_call_id", "content")}
        found.append({**plain, "content": "\n".join([*([content] if content or not calls else []), *calls])})
    for turn in found:
        turn.pop("is_result", None)
    return found


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools in words, and how to call them."""
    return _TOOLS_TEXT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def with_text(turns: Sequence[Turn], text: str, *, in_system: bool) -> list[Turn]:
    """The turns with a text behind what the system turn says or before what the first user's does; in a new one where none is."""
    role = "system" if in_system else "user"
    at = 0 if in_system else next((index for index, turn in enumerate(turns) if turn["role"] == role), len(turns))
    if at == len(turns) or turns[at]["role"] != role:
        return [{"role": role, "content": text}, *turns]
    content = turns[at]["content"]
    content = f"{content}\n\n{text}" if in_system else f"{text}\n\n{content}"
    return [*turns[:at], {**turns[at], "content": content}, *turns[at + 1 :]]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _as_text(function["arguments"])}}


def _written_call(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{_call_object(call)}\n</tool_call>"


def _call_object(call: dict[str, Any]) -> str:
    function = call["function"]
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {_as_text(function["arguments"])}}}'


def _turn(message: ChatMessage) -> Turn:
    turn: Turn = {"role": message.role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in _loaded(message.tool_calls, list, "tool_calls")]
        # Templates tell a turn of calls alone by its missing content.
        turn["content"] = message.content or None
    if message.reasoning:
        turn["reasoning_content"] = turn["thinking"] = message.reasoning
    return turn


def _call(call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments, name, call_id = str(function["arguments"]), str(function["name"]), str(call["id"])
    except (TypeError, LookupError) as error:
        raise ProtocolError("tokenize: tool_calls are not an array of calls") from error
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": _parsed(arguments)}}


def _parsed(arguments: str) -> Any:
    """Arguments as a value; as they are where they are no object that could be written again."""
    try:
        value = json.loads(arguments)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _loaded(text: str, kind: type, name: str) -> Any:
    if not text:
        return kind()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"tokenize: {name} cannot be read: {error}") from error
    if not isinstance(value, kind):
        raise ProtocolError(f"tokenize: {name} is not a {kind.__name__}")
    return value
