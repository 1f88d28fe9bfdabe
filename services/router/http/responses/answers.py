"""Answers of the Responses API: the response object and the events of its stream. Pure.

An answer's output is a list of items: reasoning, a message, then a call for each tool call, each opened, filled and closed before
the next begins. Every event has the next sequence number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from headrace.errors import HeadraceError, OverloadedError
from services.router.generation import OutputPiece, TokenLogprob, ToolCallDelta
from services.router.http import sse
from services.router.http.rendering import Usage
from services.router.http.responses.items import Item
from services.router.http.responses.shapes import ResponseCall

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass(slots=True)
class _Open:
    """The item that is being filled."""

    kind: str
    item: Item
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


Emit = Callable[[str, dict[str, Any]], bytes]


class OutputItems:
    """The items of one answer, each filled before the next; says what is to be told of it."""

    def __init__(self, emit: Emit, id_tail: str) -> None:
        """`emit` makes an event of a kind and its fields; `id_tail` makes the items' ids this answer's own."""
        self.closed: list[Item] = []
        self._emit = emit
        self._tail = id_tail
        self._open: _Open | None = None
        self._untold: list[dict[str, Any]] = []

    def add_logprobs(self, logprobs: list[dict[str, Any]]) -> None:
        """Those of further tokens: told with the next text of a message, or at its end. A token's text may come later than it."""
        self._untold += logprobs

    def add_text(self, events: list[bytes], kind: str, text: str) -> None:
        """More of a message or of reasoning."""
        if self._open is None or self._open.kind != kind:
            fields = {"summary": [], "content": []} if kind == "reasoning" else {"role": "assistant", "content": []}
            self._begin(events, kind, fields)
            events.append(self._item_event("response.content_part.added", content_index=0, part=_part(kind, "", [])))
        assert self._open is not None
        self._open.texts.append(text)
        if kind == "reasoning":
            events.append(self._item_event("response.reasoning_text.delta", content_index=0, delta=text))
        else:
            events.append(self._message_event(text))

    def add_call(self, events: list[bytes], delta: ToolCallDelta) -> None:
        """A new tool call, or more of its arguments."""
        if delta.id:
            self._begin(events, "function_call", {"call_id": delta.id, "name": delta.name, "arguments": ""})
        if delta.arguments and self._open is not None:
            self._open.texts.append(delta.arguments)
            events.append(self._item_event("response.function_call_arguments.delta", delta=delta.arguments))

    def close(self, events: list[bytes], status: str) -> None:
        """The open item, if there is one, is over."""
        opened = self._open
        if opened is None:
            return
        if opened.kind == "message" and self._untold:
            events.append(self._message_event(""))
        text = "".join(opened.texts)
        item = {**opened.item, "status": status}
        if opened.kind == "function_call":
            item["arguments"] = text
            events.append(self._item_event("response.function_call_arguments.done", arguments=text, name=item["name"]))
        else:
            part = _part(opened.kind, text, opened.logprobs)
            item["content"] = [part]
            if opened.kind == "reasoning":
                events.append(self._item_event("response.reasoning_text.done", content_index=0, text=text))
            else:
                events.append(self._item_event("response.output_text.done", content_index=0, text=text, logprobs=opened.logprobs))
            events.append(self._item_event("response.content_part.done", content_index=0, part=part))
        events.append(self._emit("response.output_item.done", {"output_index": len(self.closed), "item": item}))
        self.closed.append(item)
        self._open = None

    def _begin(self, events: list[bytes], kind: str, fields: Item) -> None:
        self.close(events, "completed")
        item_id = f"{_PREFIXES[kind]}_{self._tail}{len(self.closed):02x}"
        self._open = _Open(kind, {"id": item_id, "type": kind, "status": "in_progress", **fields})
        events.append(self._emit("response.output_item.added", {"output_index": len(self.closed), "item": self._open.item}))

    def _message_event(self, text: str) -> bytes:
        assert self._open is not None
        told, self._untold = self._untold, []
        self._open.logprobs += told
        return self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=told)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        return self._emit(kind, {"item_id": self._open.item["id"], "output_index": len(self.closed), **fields})


class ResponseAnswer:
    """Renders one response, whole and as events."""

    headers: tuple[tuple[bytes, bytes], ...] = ()
    stream_headers = sse.HEADERS

    def __init__(self, call: ResponseCall, request_id: str, *, model: str, created_unix_s: int) -> None:
        self.id = f"resp_{request_id}"
        self.is_finished = False
        self.status = "queued" if call.body.background is True else "in_progress"
        self._items = OutputItems(self._event, request_id)
        self._head = _head(call, self.id, model=model, created_unix_s=created_unix_s)
        self._with_logprobs = call.num_top_logprobs is not None
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._incomplete: dict[str, str] | None = None
        self._num_events = 0

    # The response.

    @property
    def output(self) -> list[Item]:
        """Items that are whole."""
        return self._items.closed

    def response(self) -> dict[str, Any]:
        """The response object as it stands."""
        return {
            **self._head,
            "status": self.status,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "output": list(self.output),
            "usage": self._usage,
        }

    def whole(self, usage: Usage) -> bytes:
        """The response in one piece; `end` was told its usage."""
        return orjson.dumps(self.response())

    def end(self, usage: Usage) -> None:
        """All output has come: what it cost is known."""
        self._usage = _usage_object(usage)

    def abandon(self, status: str, error: HeadraceError | None) -> None:
        """It ends without its full output, as "failed" or "cancelled"."""
        self.status = status
        self.is_finished = True
        if error is not None:
            code = "rate_limit_exceeded" if isinstance(error, OverloadedError) else "server_error"
            self._error = {"code": code, "message": error.message}

    # Events.

    def queued(self) -> list[bytes]:
        """The events that a background response begins with."""
        return [self._response_event("response.created"), self._response_event("response.queued")]

    def started(self) -> list[bytes]:
        """The events at the first output."""
        was_queued = self.status == "queued"
        self.status = "in_progress"
        first = [] if was_queued else [self._response_event("response.created")]
        return [*first, self._response_event("response.in_progress")]

    def begin(self, usage: Usage) -> bytes:
        """What a stream opens with."""
        return b"".join(self.started())

    def add(self, piece: OutputPiece) -> bytes:
        """Take one piece of output."""
        return b"".join(self.events_of(piece))

    def events_of(self, piece: OutputPiece) -> list[bytes]:
        """Take one piece of output; gives its events, each by itself."""
        events: list[bytes] = []
        if self._with_logprobs:
            self._items.add_logprobs(logprob_objects(piece.logprobs))
        if piece.reasoning:
            self._items.add_text(events, "reasoning", piece.reasoning)
        if piece.text:
            self._items.add_text(events, "message", piece.text)
        for delta in piece.tool_calls:
            self._items.add_call(events, delta)
        if piece.finish_reason is not None:
            self.is_finished = True
            is_cut = piece.finish_reason == "length"
            self._items.close(events, "incomplete" if is_cut else "completed")
            self.status = "incomplete" if is_cut else "completed"
            self._incomplete = {"reason": "max_output_tokens"} if is_cut else None
        return events

    def finish(self, usage: Usage) -> bytes:
        """What a stream closes with; `end` was told its usage."""
        return self.last_event()

    def last_event(self) -> bytes:
        """The event that tells how the response ended."""
        return self._response_event(f"response.{self.status}")

    def fail(self, error: HeadraceError) -> bytes:
        """What a stream closes with that broke."""
        self.abandon("failed", error)
        return self.last_event()

    def _response_event(self, kind: str) -> bytes:
        return self._event(kind, {"response": self.response()})

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        number = self._num_events
        self._num_events += 1
        return sse.named_event(kind, {"type": kind, "sequence_number": number, **fields})


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def logprob_objects(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Logprobs of output tokens."""
    return [
        {**_token_object(one.text, one.logprob or 0.0), "top_logprobs": [_token_object(top.text, top.logprob) for top in one.top]}
        for one in logprobs
    ]


def _token_object(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }


def _head(call: ResponseCall, response_id: str, *, model: str, created_unix_s: int) -> dict[str, Any]:
    """What of a response does not change while it is made."""
    body = call.body
    reasoning = None if body.reasoning is None else body.reasoning.effort
    text_format = {"type": "text"} if body.text is None or body.text.format is None else body.text.format.model_dump(by_alias=True)
    choice = body.tool_choice or "auto"
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_unix_s,
        "background": body.background is True,
        "conversation": None if call.conversation_id is None else {"id": call.conversation_id},
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": reasoning, "summary": None},
        "service_tier": "default",
        "store": call.is_stored,
        "temperature": body.temperature,
        "text": {"format": text_format},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def page(items: Sequence[dict[str, Any]], *, has_more: bool) -> bytes:
    """A part of a list, as all of OpenAI's lists look."""
    return orjson.dumps(
        {
            "object": "list",
            "data": items,
            "first_id": items[0]["id"] if items else None,
            "last_id": items[-1]["id"] if items else None,
            "has_more": has_more,
        }
    )


def deleted(what: str, object_id: str) -> bytes:
    """Answer of a DELETE."""
    return orjson.dumps({"id": object_id, "object": what, "deleted": True})
