"""Items: what a response is given and gives, and a conversation keeps. Pure.

An item is a message, a tool call, a tool's result or reasoning. They are checked here, given the form in which they are listed, and
turned into turns of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from services.router.generation import ChatTurn, ToolCall
from services.router.http.validation import Body
from services.router.limits import refuse

Item = dict[str, Any]
_Status = Literal["in_progress", "completed", "incomplete"]
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
UNIONS = {
    "input": "a string or an array of items",
    "content": "a string or an array of parts",
    "output": "a string or an array of input_text parts",
}


class InputText(Body):
    """Text from the client."""

    type: Literal["input_text"]
    text: str


class OutputText(Body):
    """Text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(None, description="Ignored.")
    logprobs: list[Any] | None = Field(None, description="Ignored.")


class RefusalPart(Body):
    """A refusal of an earlier answer."""

    type: Literal["refusal"]
    refusal: str


class ReasoningText(Body):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Body):
    """A summary of reasoning; not shown to the model."""

    type: Literal["summary_text"]
    text: str


class MessageItem(Body):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[InputText | OutputText | RefusalPart, Field(discriminator="type")]]
    id: str | None = None
    status: _Status | None = None
    phase: str | None = Field(default=None, description="Ignored.")


class FunctionCallItem(Body):
    """A tool call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=128)
    arguments: str
    id: str | None = None
    status: _Status | None = None


class FunctionCallOutputItem(Body):
    """What a tool call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=256)
    output: str | list[InputText]
    id: str | None = None
    status: _Status | None = None


class ReasoningItem(Body):
    """Reasoning of an earlier answer, given back."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = Field(None, description="Ignored: nothing here is encrypted.")
    status: _Status | None = None


class ItemReference(Body):
    """An item that is kept already, by its id."""

    type: Literal["item_reference"]
    id: str


InputItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference, Field(discriminator="type")
]


def named_messages(value: object) -> object:
    """A list of items in which messages that leave their type out, as they may, have one."""
    if not isinstance(value, list):
        return value
    return [
        {"type": "message", **item} if isinstance(item, dict) and "role" in item and "type" not in item else item for item in value
    ]


def listed(items: Sequence[InputItem], id_root: str) -> list[Item]:
    """Items as they are listed and kept: each with an id, a status, and its content as parts.

    Args:
        items: Checked items. References stay what they are.
        id_root: Makes ids of those that have none; unlike that of any other call.
    """
    return [_listed(item, f"{id_root}{index:04x}") for index, item in enumerate(items)]


def _listed(item: InputItem, id_tail: str) -> Item:
    if isinstance(item, ItemReference):
        return {"type": item.type, "id": item.id}
    made: Item = {**item.model_dump(exclude_none=True), "id": item.id or f"{_PREFIXES[item.type]}_{id_tail}"}
    made.pop("phase", None)
    if isinstance(item, ReasoningItem):
        made.pop("encrypted_content", None)
        return made
    made["status"] = item.status or "completed"
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        part = {"type": kind, "text": item.content}
        made["content"] = [{**part, "annotations": []} if kind == "output_text" else part]
    return made


def turns_of(items: Sequence[Item]) -> list[ChatTurn]:
    """A conversation's turns. Reasoning, text and calls of one answer are items each, and one turn together.

    Raises:
        InvalidRequestError: A result names no call before it.
    """
    turns: list[ChatTurn] = []
    names: dict[str, str] = {}
    reasoning = ""
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            reasoning += "".join(part["text"] for part in item.get("content") or ())
            continue
        if kind == "function_call":
            names[item["call_id"]] = item["name"]
            _add_call(turns, ToolCall(item["call_id"], item["name"], item["arguments"]), reasoning)
        elif kind == "function_call_output":
            name = names.get(item["call_id"])
            if name is None:
                refuse("input", "function_call_output items whose call_id is that of a function_call before them", item["call_id"])
            turns.append(ChatTurn("tool", _text(item["output"]), name=name, tool_call_id=item["call_id"]))
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            turns.append(ChatTurn(role, _text(item["content"]), reasoning=reasoning if role == "assistant" else ""))
        reasoning = ""
    return turns


def _add_call(turns: list[ChatTurn], call: ToolCall, reasoning: str) -> None:
    before = turns[-1] if turns else None
    if before is not None and before.role == "assistant" and not reasoning:
        turns[-1] = ChatTurn("assistant", before.content, tool_calls=(*before.tool_calls, call), reasoning=before.reasoning)
    else:
        turns.append(ChatTurn("assistant", "", tool_calls=(call,), reasoning=reasoning))


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)
