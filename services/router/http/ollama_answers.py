"""Ollama's answer shapes as bytes: JSON, or a line of JSON for each piece. Pure; the time comes in.

A tool call is told when it is whole, as Ollama tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import orjson

from headrace.errors import HeadraceError
from services.router.generation import ModelOffer, OutputPiece, TokenLogprob, ToolCallDelta
from services.router.http.rendering import Usage
from services.router.http.timestamps import utc_text

STREAM_HEADERS: list[tuple[bytes, bytes]] = [(b"content-type", b"application/x-ndjson"), (b"x-accel-buffering", b"no")]


def error_object(error: HeadraceError) -> dict[str, object]:
    """An error in Ollama's shape."""
    return {"error": error.message}


def tags(offers: Sequence[ModelOffer]) -> bytes:
    """GET /api/tags."""
    return orjson.dumps({"models": [_model(offer) for offer in offers]})


def running(offers: Sequence[ModelOffer]) -> bytes:
    """GET /api/ps: all models that are served are loaded."""
    return orjson.dumps({"models": [{**_model(offer), "context_length": offer.max_model_len} for offer in offers]})


def show(offer: ModelOffer) -> bytes:
    """POST /api/show."""
    return orjson.dumps(
        {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "license": "",
            "modified_at": utc_text(offer.loaded_unix_s * 10**9),
            "details": _DETAILS,
            "model_info": {"general.basename": offer.name, "general.context_length": offer.max_model_len},
            "capabilities": ["completion", "tools", "thinking"],
        }
    )


_DETAILS = {"parent_model": "", "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": ""}


def _model(offer: ModelOffer) -> dict[str, Any]:
    return {
        "name": offer.name,
        "model": offer.name,
        "modified_at": utc_text(offer.loaded_unix_s * 10**9),
        "size": 0,
        # Of the name: weights have no digest here.
        "digest": sha256(offer.name.encode()).hexdigest(),
        "details": _DETAILS,
    }


@dataclass(slots=True)
class _Kept:
    """All output so far, for the answer in one piece."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Clock:
    """Now: by a clock that only goes forward, and by the calendar. Both in nanoseconds."""

    monotonic_ns: Callable[[], int]
    unix_ns: Callable[[], int]


class OllamaAnswer:
    """Renders the answer of one /api/chat or /api/generate call."""

    headers: tuple[tuple[bytes, bytes], ...] = ()
    stream_headers = STREAM_HEADERS

    def __init__(self, *, model: str, is_chat: bool, clock: Clock) -> None:
        self.is_finished = False
        self._model = model
        self._is_chat = is_chat
        self._clock = clock
        self._began_ns = clock.monotonic_ns()
        self._first_ns = 0
        self._kept = _Kept()
        self._call: list[ToolCallDelta] = []
        self._done_reason = "stop"

    def begin(self, usage: Usage) -> bytes:
        """A stream opens with its first text."""
        return b""

    def add(self, piece: OutputPiece) -> bytes:
        """Take one piece of output."""
        self._first_ns = self._first_ns or self._clock.monotonic_ns()
        calls = self._whole_calls(piece)
        logprobs = [_logprob_object(one) for one in piece.logprobs]
        if piece.finish_reason is not None:
            self.is_finished = True
            self._done_reason = "length" if piece.finish_reason == "length" else "stop"
        self._kept.texts.append(piece.text)
        self._kept.reasoning.append(piece.reasoning)
        self._kept.calls += calls
        self._kept.logprobs += logprobs
        # A token's text may come later than the token and what is told of it.
        if not (piece.text or piece.reasoning or calls or logprobs):
            return b""
        return self._line(self._content(piece.text, piece.reasoning, calls, logprobs), is_done=False)

    def finish(self, usage: Usage) -> bytes:
        """The last line: why it ended, and what it cost."""
        return self._line({**self._content("", "", [], []), **self._end(usage)}, is_done=True)

    def fail(self, error: HeadraceError) -> bytes:
        """The line that ends a stream that broke."""
        return orjson.dumps(error_object(error)) + b"\n"

    def whole(self, usage: Usage) -> bytes:
        """The answer in one piece."""
        kept = self._kept
        content = self._content("".join(kept.texts), "".join(kept.reasoning), kept.calls, kept.logprobs)
        return self._line({**content, **self._end(usage)}, is_done=True)

    def loaded(self) -> bytes:
        """The answer to a call that asks for nothing but the model."""
        return self._line({**self._content("", "", [], []), "done_reason": "load"}, is_done=True)

    def _content(self, text: str, reasoning: str, calls: list[dict[str, Any]], logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        thinking = {"thinking": reasoning} if reasoning else {}
        made = {"tool_calls": calls} if calls else {}
        told = {"logprobs": logprobs} if logprobs else {}
        if self._is_chat:
            return {"message": {"role": "assistant", "content": text, **thinking, **made}, **told}
        return {"response": text, **thinking, **told}

    def _line(self, fields: dict[str, Any], *, is_done: bool) -> bytes:
        created = utc_text(self._clock.unix_ns(), unit="us")
        return orjson.dumps({"model": self._model, "created_at": created, "done": is_done, **fields}) + b"\n"

    def _end(self, usage: Usage) -> dict[str, Any]:
        now_ns = self._clock.monotonic_ns()
        return {
            "done_reason": self._done_reason,
            "total_duration": now_ns - self._began_ns,
            "load_duration": 0,
            "prompt_eval_count": usage.num_prompt_tokens,
            "prompt_eval_duration": self._first_ns - self._began_ns,
            "eval_count": usage.num_output_tokens,
            "eval_duration": now_ns - self._first_ns,
        }

    def _whole_calls(self, piece: OutputPiece) -> list[dict[str, Any]]:
        """Calls that are whole now: another has begun after them, or the output has ended."""
        whole = []
        for delta in piece.tool_calls:
            if delta.id and self._call:
                whole.append(self._take_call())
            self._call.append(delta)
        if piece.finish_reason is not None and self._call:
            whole.append(self._take_call())
        return whole

    def _take_call(self) -> dict[str, Any]:
        parts, self._call = self._call, []
        text = "".join(part.arguments for part in parts)
        try:
            arguments = orjson.loads(text or "{}")
        except orjson.JSONDecodeError:
            arguments = None
        # A call cut off by the length has no whole arguments: what there is of them is kept.
        function = {"name": parts[0].name, "arguments": arguments if isinstance(arguments, dict) else {"incomplete_json": text}}
        return {"id": parts[0].id, "function": {"index": parts[0].index, **function}}


def _logprob_object(one: TokenLogprob) -> dict[str, Any]:
    tops = [_token_object(top.text, top.logprob) for top in one.top]
    return {**_token_object(one.text, one.logprob or 0.0), "top_logprobs": tops}


def _token_object(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}
