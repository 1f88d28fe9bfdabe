"""Anthropic's answer shapes as bytes. Pure.

An answer is a list of blocks: reasoning, then text, then tool calls, each opened, filled and closed before the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from headrace.errors import HeadraceError
from services.router.generation import ModelOffer, OutputPiece
from services.router.http import sse
from services.router.http.matched_stop import take_stop
from services.router.http.openai_answers import error_status
from services.router.http.rendering import Usage
from services.router.http.timestamps import utc_text

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTA_FIELDS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


def error_object(error: HeadraceError) -> dict[str, object]:
    """An error in Anthropic's shape."""
    kind = _ERROR_TYPES.get(error_status(error), "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def token_count(num_tokens: int) -> bytes:
    """Answer of POST /v1/messages/count_tokens."""
    return orjson.dumps({"input_tokens": num_tokens})


def models_page(offers: Sequence[ModelOffer]) -> bytes:
    """GET /v1/models as Anthropic's clients read it."""
    models = [model_object(offer) for offer in offers]
    ids = [offer.name for offer in offers]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return orjson.dumps({"data": models, "has_more": False, **ends})


def model_object(offer: ModelOffer) -> dict[str, object]:
    """One model."""
    created = utc_text(offer.loaded_unix_s * 10**9)
    return {"type": "model", "id": offer.name, "display_name": offer.name, "created_at": created}


@dataclass(slots=True)
class _Block:
    kind: str
    head: dict[str, Any]
    texts: list[str] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.kind == "tool_use":
            return {**self.head, "input": _tool_input(text)}
        return {**self.head, self.kind: text}


class MessageAnswer:
    """Renders the answer of one /v1/messages call."""

    def __init__(self, request_id: str, *, model: str, stop_sequences: Sequence[str]) -> None:
        self.is_finished = False
        self._id = f"msg_{request_id}"
        self._request_id = request_id
        self._model = model
        self._stops = stop_sequences
        self._blocks: list[_Block] = []
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Where Anthropic's clients look for the request's name."""
        return [(b"request-id", self._request_id.encode())]

    @property
    def stream_headers(self) -> list[tuple[bytes, bytes]]:
        """Head of a streamed answer."""
        return [*sse.HEADERS, *self.headers]

    def begin(self, usage: Usage) -> bytes:
        """The message without content."""
        return sse.named_event("message_start", {"type": "message_start", "message": self._message([], usage)}) + sse.named_event(
            "ping", {"type": "ping"}
        )

    def add(self, piece: OutputPiece) -> bytes:
        """Take one piece of output."""
        stopped, sequence = take_stop(piece, self._stops)
        chunk = b""
        if stopped.reasoning:
            chunk += self._extend("thinking", stopped.reasoning, {"type": "thinking", "signature": ""})
        if stopped.text:
            chunk += self._extend("text", stopped.text, {"type": "text"})
        for delta in stopped.tool_calls:
            if delta.id:
                chunk += self._open("tool_use", {"type": "tool_use", "id": delta.id, "name": delta.name})
            if delta.arguments:
                chunk += self._extend("tool_use", delta.arguments, {})
        if stopped.finish_reason is not None:
            chunk += self._close()
            self.is_finished = True
            self._stop_sequence = sequence
            reason = _STOP_REASONS.get(stopped.finish_reason, "end_turn")
            # Clients answer calls where the reason is tool_use.
            self._stop_reason = "stop_sequence" if sequence is not None and reason == "end_turn" else reason
        return chunk

    def finish(self, usage: Usage) -> bytes:
        """Why it ended, and what it cost."""
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return sse.named_event(
            "message_delta", {"type": "message_delta", "delta": delta, "usage": _usage_object(usage)}
        ) + sse.named_event("message_stop", {"type": "message_stop"})

    def fail(self, error: HeadraceError) -> bytes:
        """The event that ends a stream that broke."""
        return sse.named_event("error", error_object(error))

    def whole(self, usage: Usage) -> bytes:
        """The message in one piece."""
        return orjson.dumps(self._message([block.whole() for block in self._blocks], usage))

    def _message(self, content: list[dict[str, Any]], usage: Usage) -> dict[str, object]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": _usage_object(usage),
        }

    def _extend(self, kind: str, text: str, head: dict[str, Any]) -> bytes:
        chunk = b""
        if not self._blocks or self._blocks[-1].kind != kind:
            chunk = self._open(kind, head)
        self._blocks[-1].texts.append(text)
        delta_type, field_name = _DELTA_FIELDS[kind]
        index = len(self._blocks) - 1
        delta = {"type": delta_type, field_name: text}
        return chunk + sse.named_event("content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta})

    def _open(self, kind: str, head: dict[str, Any]) -> bytes:
        chunk = self._close()
        self._blocks.append(_Block(kind, head))
        empty = {**head, "input": {}} if kind == "tool_use" else {**head, kind: ""}
        index = len(self._blocks) - 1
        return chunk + sse.named_event(
            "content_block_start", {"type": "content_block_start", "index": index, "content_block": empty}
        )

    def _close(self) -> bytes:
        """The end of the last block, if there is one."""
        if not self._blocks:
            return b""
        return sse.named_event("content_block_stop", {"type": "content_block_stop", "index": len(self._blocks) - 1})


def _tool_input(text: str) -> dict[str, Any]:
    """Arguments as an object. A call cut off by the length has no whole one: what there is of it is kept."""
    if not text:
        return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {"incomplete_json": text}


def _usage_object(usage: Usage) -> dict[str, int]:
    """Anthropic counts cached prompt tokens beside, not among, the input tokens."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
    }
