"""OpenAI's answer shapes as bytes. Pure.

A stream's chunks differ only in their text, so what surrounds it is made once a stream and a chunk costs one JSON string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import orjson

from headrace.errors import (
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
)
from services.router.generation import ModelOffer, OutputPiece, TokenLogprob
from services.router.http.logprob_shapes import CompletionLogprobs, chat_logprobs, prompt_logprobs
from services.router.http.openai_tools import delta_of, message_of

DONE = b"data: [DONE]\n\n"


def error_status(error: HeadraceError) -> int:
    """The HTTP status of an error; a status no client should see (499) becomes 500."""
    return error.http_status if error.http_status != 499 else 500


def error_object(error: HeadraceError) -> dict[str, object]:
    """An error in OpenAI's shape."""
    is_unknown_model = isinstance(error, NotFoundError) and error.param == "model"
    return {
        "error": {
            "message": error.message,
            "type": _error_type(error),
            "param": error.param,
            "code": "model_not_found" if is_unknown_model else error.code,
        }
    }


def _error_type(error: HeadraceError) -> str:
    if isinstance(error, InvalidRequestError):
        return "invalid_request_error"
    if isinstance(error, UnauthenticatedError):
        return "authentication_error"
    if isinstance(error, OverloadedError):
        return "rate_limit_error"
    if isinstance(error, UnavailableError):
        return "service_unavailable_error"
    return "timeout_error" if error.http_status == 408 else "server_error"


def usage(
    *, num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int, num_reasoning_tokens: int = 0
) -> dict[str, object]:
    """The usage object of an answer."""
    details = {"completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens}} if num_reasoning_tokens else {}
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        **details,
    }


def models_page(offers: Iterable[ModelOffer]) -> dict[str, object]:
    """GET /v1/models."""
    return {"object": "list", "data": [model_object(offer) for offer in offers]}


def model_object(offer: ModelOffer) -> dict[str, object]:
    """One model, with the context length that vLLM's clients look for."""
    return {
        "id": offer.name,
        "object": "model",
        "created": offer.loaded_unix_s,
        "owned_by": "headrace",
        "max_model_len": offer.max_model_len,
    }


class ChatAnswer:
    """Renders the answer of one chat request.

    Args:
        request_id: The call's.
        model: Which answers.
        created_unix_s: When it was asked.
        include_usage: Send a last chunk with the usage.
        has_running_usage: Send the usage so far in every chunk.
        keeps_logprobs: Logprobs of the output were asked for.
        tells_prompt: Those of the prompt, too.
    """

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(
        self,
        request_id: str,
        *,
        model: str,
        created_unix_s: int,
        include_usage: bool,
        has_running_usage: bool = False,
        keeps_logprobs: bool = False,
        tells_prompt: bool = False,
    ) -> None:
        self.id = self.id_prefix + request_id
        self.has_running_usage = has_running_usage
        self._model = model
        self._created_unix_s = created_unix_s
        self._include_usage = include_usage
        self._keeps_logprobs = keeps_logprobs
        self._tells_prompt = tells_prompt
        # With include_usage OpenAI sends `"usage": null` in every chunk but the last.
        self._usage_null = b',"usage":null' if include_usage else b""
        self._chunk_head = b"data: " + orjson.dumps(self._head(self.chunk_object_name))[:-1] + b',"choices":[{"index":'
        # By choice, made with its first text.
        self._prefixes: dict[int, bytes] = {}
        self._suffix = self._delta_close + b',"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}\n\n"

    _delta_open = b'"delta":{"content":'
    _delta_close = b"}"
    _delta_last = b'"delta":{}'

    def _head(self, object_name: str) -> dict[str, object]:
        return {"id": self.id, "object": object_name, "created": self._created_unix_s, "model": self._model}

    def first_chunk(self, choice: int = 0) -> bytes:
        """The chunk that opens the assistant's turn."""
        return self._chunk(choice, b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null')

    def text_chunk(self, text: str, choice: int = 0) -> bytes:
        """A chunk of text: the hot path."""
        prefix = self._prefixes.get(choice)
        if prefix is None:
            prefix = self._prefixes[choice] = self._chunk_head + b"%d," % choice + self._delta_open
        return prefix + orjson.dumps(text) + self._suffix

    def output_chunk(self, piece: OutputPiece, usage_object: dict[str, object] | None = None) -> bytes:
        """A chunk of output with its logprobs, or the usage so far; empty where there is nothing to tell."""
        tells = self._keeps_logprobs and bool(piece.logprobs)
        is_text = not piece.reasoning and not piece.tool_calls
        if is_text and not piece.text and not tells:
            return b""
        if is_text and usage_object is None and not tells:
            return self.text_chunk(piece.text, piece.choice)
        told = orjson.dumps(self._logprobs(piece.choice, piece.logprobs))
        if is_text:
            delta = self._delta_open + orjson.dumps(piece.text) + self._delta_close
        else:
            delta = b'"delta":' + orjson.dumps(delta_of(piece))
        rest = delta + b',"logprobs":' + told + b',"finish_reason":null'
        return self._chunk(piece.choice, rest, usage_object)

    def last_chunk(self, finish_reason: str, choice: int = 0, usage_object: dict[str, object] | None = None) -> bytes:
        """The chunk that tells why a choice ended."""
        rest = self._delta_last + b',"logprobs":null,"finish_reason":' + orjson.dumps(finish_reason)
        return self._chunk(choice, rest, usage_object)

    def usage_chunk(self, usage_object: dict[str, object]) -> bytes:
        """The chunk with no choices that carries the usage; empty unless it was asked for."""
        if not self._include_usage:
            return b""
        return b"data: " + orjson.dumps({**self._head(self.chunk_object_name), "choices": [], "usage": usage_object}) + b"\n\n"

    def whole(self, choices: Sequence[OutputPiece], usage_object: dict[str, object]) -> bytes:
        """The answer in one piece; `choices` are whole, in order."""
        objects = [self._choice(index, piece) for index, piece in enumerate(choices)]
        body = {**self._head(self.object_name), "choices": objects, "usage": usage_object}
        if self._tells_prompt:
            self._tell_prompt(body, objects, choices)
        return orjson.dumps(body)

    def _choice(self, index: int, piece: OutputPiece) -> dict[str, object]:
        told = self._logprobs(index, piece.logprobs)
        return {"index": index, **self._whole_output(piece), "logprobs": told, "finish_reason": piece.finish_reason}

    def _whole_output(self, piece: OutputPiece) -> dict[str, object]:
        return {"message": message_of(piece)}

    def _logprobs(self, choice: int, tokens: Sequence[TokenLogprob]) -> dict[str, object] | None:
        return chat_logprobs(tokens) if self._keeps_logprobs else None

    def _tell_prompt(self, body: dict[str, object], objects: Sequence[dict[str, object]], choices: Sequence[OutputPiece]) -> None:
        """Add the prompt's logprobs where vLLM has them: a conversation has one prompt."""
        body["prompt_logprobs"] = prompt_logprobs(choices[0].prompt_logprobs)

    def _chunk(self, choice: int, rest: bytes, usage_object: dict[str, object] | None = None) -> bytes:
        usage_part = self._usage_null if usage_object is None else b',"usage":' + orjson.dumps(usage_object)
        return self._chunk_head + b"%d," % choice + rest + b"}]" + usage_part + b"}\n\n"


class CompletionAnswer(ChatAnswer):
    """Renders the answer of one plain completion: the same frame round `text` instead of a message."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    _delta_open = b'"text":'
    _delta_close = b""
    _delta_last = b'"text":""'
    _told: CompletionLogprobs | None = None

    def first_chunk(self, choice: int = 0) -> bytes:
        """A completion opens with its first text."""
        return b""

    def _whole_output(self, piece: OutputPiece) -> dict[str, object]:
        return {"text": piece.text}

    def _logprobs(self, choice: int, tokens: Sequence[TokenLogprob]) -> dict[str, object] | None:
        if not self._keeps_logprobs:
            return None
        if self._told is None:
            self._told = CompletionLogprobs()
        return self._told.add(choice, tokens)

    def _tell_prompt(self, body: dict[str, object], objects: Sequence[dict[str, object]], choices: Sequence[OutputPiece]) -> None:
        for choice, piece in zip(objects, choices, strict=True):
            choice["prompt_logprobs"] = prompt_logprobs(piece.prompt_logprobs)
