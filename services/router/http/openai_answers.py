"""OpenAI's answer shapes as bytes. Pure.

A stream's chunks differ only in their text, so what surrounds it is made once a stream and a chunk costs one JSON string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import orjson

from headrace.errors import HeadraceError, InvalidRequestError, NotFoundError, OverloadedError, UnavailableError
from services.router.generation import ModelOffer

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
    if isinstance(error, OverloadedError):
        return "rate_limit_error"
    if isinstance(error, UnavailableError):
        return "service_unavailable_error"
    return "timeout_error" if error.http_status == 408 else "server_error"


def usage(*, num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, object]:
    """The usage object of an answer."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
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
    """Renders the answer of one chat request."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, request_id: str, *, model: str, created_unix_s: int, include_usage: bool) -> None:
        self.id = self.id_prefix + request_id
        self._model = model
        self._created_unix_s = created_unix_s
        self._include_usage = include_usage
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

    def last_chunk(self, finish_reason: str, choice: int = 0) -> bytes:
        """The chunk that tells why a choice ended."""
        return self._chunk(choice, self._delta_last + b',"logprobs":null,"finish_reason":' + orjson.dumps(finish_reason))

    def usage_chunk(self, usage_object: dict[str, object]) -> bytes:
        """The chunk with no choices that carries the usage; empty unless it was asked for."""
        if not self._include_usage:
            return b""
        return b"data: " + orjson.dumps({**self._head(self.chunk_object_name), "choices": [], "usage": usage_object}) + b"\n\n"

    def whole(self, choices: Sequence[tuple[str, str]], usage_object: dict[str, object]) -> bytes:
        """The answer in one piece; `choices` are texts with their finish reasons, in order."""
        objects = [
            {"index": index, **self._whole_text(text), "logprobs": None, "finish_reason": finish_reason}
            for index, (text, finish_reason) in enumerate(choices)
        ]
        return orjson.dumps({**self._head(self.object_name), "choices": objects, "usage": usage_object})

    def _whole_text(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _chunk(self, choice: int, rest: bytes) -> bytes:
        return self._chunk_head + b"%d," % choice + rest + b"}]" + self._usage_null + b"}\n\n"


class CompletionAnswer(ChatAnswer):
    """Renders the answer of one plain completion: the same frame round `text` instead of a message."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    _delta_open = b'"text":'
    _delta_close = b""
    _delta_last = b'"text":""'

    def first_chunk(self, choice: int = 0) -> bytes:
        """A completion opens with its first text."""
        return b""

    def _whole_text(self, text: str) -> dict[str, object]:
        return {"text": text}
