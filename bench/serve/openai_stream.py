"""The OpenAI shapes, as far as a load client needs them: the body of a request, and what one streamed chunk says. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from bench.serve.records import RequestRecord, RequestSpec

DONE = b"[DONE]"
# Where engines put the text of a chat chunk: the answer, or the reasoning under either of its two names.
_DELTA_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")


class Endpoint(StrEnum):
    """Which of the two generating endpoints is called."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        """Its path under the base URL."""
        return "/v1/completions" if self is Endpoint.COMPLETIONS else "/v1/chat/completions"


@dataclass(frozen=True)
class Sampling:
    """What every request of a run asks for."""

    model: str
    temperature: float = 0.0
    ignore_eos: bool = False


class ChunkError(ValueError):
    """A chunk is not what the protocol promises, or carries the server's error object."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def request_body(endpoint: Endpoint, sampling: Sampling, spec: RequestSpec) -> bytes:
    """The JSON body of one streaming request; asks for the usage chunk.

    Raises:
        ValueError: Chat messages for the completions endpoint.
    """
    body: dict[str, Any] = {
        "model": sampling.model,
        "max_tokens": spec.num_output_tokens,
        "temperature": sampling.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # Not part of OpenAI's own API, so it is sent only when asked for.
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if endpoint is Endpoint.COMPLETIONS:
        if not isinstance(spec.prompt, str):
            raise ValueError("the completions endpoint takes a text prompt, not messages")
        body["prompt"] = spec.prompt
    else:
        body["messages"] = [{"role": "user", "content": spec.prompt}] if isinstance(spec.prompt, str) else spec.prompt
    return orjson.dumps(body)


def apply_chunk(record: RequestRecord, data: bytes, *, now_ns: int) -> None:
    """Note in the record what one streamed chunk says.

    Raises:
        ChunkError: The chunk is no JSON object, or is the server's error.
    """
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ChunkError("bad_chunk", f"not JSON: {data[:100]!r}") from error
    if not isinstance(chunk, dict):
        raise ChunkError("bad_chunk", f"not an object: {data[:100]!r}")
    if error_object := chunk.get("error"):
        message = error_object.get("message") if isinstance(error_object, dict) else error_object
        raise ChunkError("stream_error", str(message))
    choices = chunk.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ChunkError("bad_chunk", f"`choices` is no list of objects: {data[:100]!r}")
    if any(_has_text(choice) for choice in choices):
        record.chunk_times_ns.append(now_ns)
    for choice in choices:
        if text := choice.get("text"):
            record.pieces.append(str(text))
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    if usage := chunk.get("usage"):
        record.usage_prompt_tokens = usage.get("prompt_tokens")
        record.usage_output_tokens = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        record.usage_cached_tokens = details.get("cached_tokens")


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether the choice carries output; the opening chunk with the role alone does not."""
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in _DELTA_TEXTS)
