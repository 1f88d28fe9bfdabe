"""Answers of POST /generate, in SGLang's shape. Pure.

A streamed answer tells all text so far each time, as SGLang's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from headrace.errors import HeadraceError
from services.router.generation import OutputPiece, TokenLogprob
from services.router.http import openai_answers, sse
from services.router.http.generate import Asked, GenerateCall
from services.router.http.matched_stop import take_stop
from services.router.http.rendering import Usage

Triple = list[Any]


@dataclass(slots=True)
class _Output:
    """One choice of one prompt, so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class GenerateAnswer:
    """Renders the answer of one /generate call."""

    headers: tuple[tuple[bytes, bytes], ...] = ()
    stream_headers = sse.HEADERS

    def __init__(
        self, call: GenerateCall, request_id: str, *, usage_of: Callable[[int], Usage], elapsed_s: Callable[[], float]
    ) -> None:
        """`usage_of` tells what a prompt has cost so far, by its number; `elapsed_s` the time since the call began."""
        self._call = call
        self._request_id = request_id
        self._usage_of = usage_of
        self._elapsed_s = elapsed_s
        self._outputs = [_Output() for _ in range(len(call.prompts) * call.num_choices)]
        self._num_unfinished = len(self._outputs)

    @property
    def is_finished(self) -> bool:
        """Whether all choices of all prompts have ended."""
        return not self._num_unfinished

    def begin(self, usage: Usage) -> bytes:
        """A stream opens with its first text."""
        return b""

    def add(self, piece: OutputPiece) -> bytes:
        """Take one piece of output."""
        output, asked = self._outputs[piece.choice], self._asked(piece.choice)
        stopped, matched = take_stop(piece, asked.stops)
        output.text += piece.text if asked.keeps_stop else stopped.text
        output.token_ids.extend(piece.token_ids)
        output.logprobs.extend(piece.logprobs)
        output.prompt_logprobs.extend(piece.prompt_logprobs)
        if piece.finish_reason is not None:
            self._num_unfinished -= 1
            output.finish_reason = _finish_reason(piece.finish_reason, matched, output.token_ids)
        if not self._call.is_streaming:
            return b""
        value = self._object(piece.choice)
        return sse.event({**value, "index": piece.choice} if len(self._outputs) > 1 else value)

    def finish(self, usage: Usage) -> bytes:
        """What a stream closes with."""
        return openai_answers.DONE

    def fail(self, error: HeadraceError) -> bytes:
        """What a stream closes with that broke."""
        return sse.event(openai_answers.error_object(error))

    def whole(self, usage: Usage) -> bytes:
        """The answer in one piece: an object, or an array of them."""
        objects = [self._object(index) for index in range(len(self._outputs))]
        return orjson.dumps(objects if self._call.is_batch or len(objects) > 1 else objects[0])

    def _asked(self, choice: int) -> Asked:
        return self._call.prompts[choice // self._call.num_choices]

    def _object(self, choice: int) -> dict[str, Any]:
        output, asked = self._outputs[choice], self._asked(choice)
        prompt = choice // self._call.num_choices
        usage = self._usage_of(prompt)
        suffix = f"-{choice}" if len(self._outputs) > 1 else ""
        meta: dict[str, Any] = {
            "id": asked.rid or f"{self._request_id}{suffix}",
            "finish_reason": output.finish_reason,
            "prompt_tokens": usage.num_prompt_tokens,
            "completion_tokens": len(output.token_ids),
            "cached_tokens": usage.num_cached_tokens,
            "e2e_latency": self._elapsed_s(),
        }
        if asked.generation.logprobs is not None:
            tells_text = self._call.tells_text
            prompt_logprobs = output.prompt_logprobs[max(0, asked.logprob_start) :]
            meta["input_token_logprobs"] = _triples(prompt_logprobs, tells_text)
            meta["output_token_logprobs"] = _triples(output.logprobs, tells_text)
            if asked.generation.logprobs:
                meta["input_top_logprobs"] = _tops(prompt_logprobs, tells_text)
                meta["output_top_logprobs"] = _tops(output.logprobs, tells_text)
        return {"text": output.text, "output_ids": list(output.token_ids), "meta_info": meta}


def _finish_reason(reason: str, matched: str | None, token_ids: Sequence[int]) -> dict[str, Any]:
    if reason == "length":
        return {"type": "length", "length": len(token_ids)}
    # Without a stop string it was the last token that ended it.
    return {"type": "stop", "matched": matched if matched is not None else token_ids[-1] if token_ids else None}


def _triples(logprobs: Sequence[TokenLogprob], tells_text: bool) -> list[Triple]:
    return [[one.logprob, one.token_id, _text(one.text, tells_text)] for one in logprobs]


def _tops(logprobs: Sequence[TokenLogprob], tells_text: bool) -> list[list[Triple] | None]:
    return [[[top.logprob, top.token_id, _text(top.text, tells_text)] for top in one.top] or None for one in logprobs]


def _text(text: bytes, tells_text: bool) -> str | None:
    return text.decode(errors="replace") if tells_text else None
