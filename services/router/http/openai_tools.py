"""Reasoning and tool calls in OpenAI's answers, whole and as deltas. Pure."""

from __future__ import annotations

from services.router.generation import OutputPiece, ToolCallDelta


def message_of(piece: OutputPiece) -> dict[str, object]:
    """An assistant's message; of calls alone, without content. `reasoning` is what newer clients call `reasoning_content`."""
    content = None if piece.tool_calls and not piece.text else piece.text
    message: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
    if piece.reasoning:
        message |= {"reasoning_content": piece.reasoning, "reasoning": piece.reasoning}
    if piece.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in piece.tool_calls
        ]
    return message


def delta_of(piece: OutputPiece) -> dict[str, object]:
    """What a piece adds to a message."""
    delta: dict[str, object] = {}
    if piece.reasoning:
        delta |= {"reasoning_content": piece.reasoning, "reasoning": piece.reasoning}
    if piece.text:
        delta["content"] = piece.text
    if piece.tool_calls:
        delta["tool_calls"] = [_call_delta(call) for call in piece.tool_calls]
    return delta


def _call_delta(call: ToolCallDelta) -> dict[str, object]:
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
