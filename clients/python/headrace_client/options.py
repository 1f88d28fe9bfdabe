"""How calls are made: their fields, deadlines, retries and traces."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace_client.errors import HeadraceError, OverloadedError, UnavailableError
from headrace_client.types import Message, Piece, Usage
from headrace_client.v1 import common_pb2 as common
from headrace_client.v1 import inference_pb2 as inference
from headrace_client.v1 import tokenizer_pb2 as tokenizer

_SAMPLING = frozenset(field.name for field in common.SamplingParams.DESCRIPTOR.fields)
_STOPPING = frozenset(field.name for field in common.StoppingParams.DESCRIPTOR.fields)
_FINISH_REASONS = {common.FINISH_REASON_STOP: "stop", common.FINISH_REASON_LENGTH: "length"}
Request = inference.ChatRequest | inference.GenerateRequest


@dataclass(frozen=True, slots=True)
class Retries:
    """When a call is made again: the server cannot be reached or is overloaded, and nothing of the answer has come yet.

    A generation is asked for with the same seed again, so a retry changes nothing but the time. The deadline bounds all waits.

    Attributes:
        num: Most retries of a call; 0 for none.
        first_wait_s: Wait before the first, where the server does not say how long; each next one is twice as long.
        longest_wait_s: Longest wait; a server that asks for more is not waited for.
    """

    num: int = 3
    first_wait_s: float = 0.2
    longest_wait_s: float = 5.0

    def wait_s(self, error: HeadraceError, num_done: int, remaining_s: float | None) -> float | None:
        """How long to wait before the next try, seconds; None for no further try."""
        if num_done >= self.num or not isinstance(error, (OverloadedError, UnavailableError)):
            return None
        wait_s = self.first_wait_s * 2**num_done * random.uniform(0.75, 1.25)
        wait_s = min(wait_s, self.longest_wait_s) if error.retry_after_s is None else error.retry_after_s
        if wait_s > self.longest_wait_s or (remaining_s is not None and wait_s >= remaining_s):
            return None
        return wait_s


@dataclass(frozen=True, slots=True)
class Settings:
    """What all calls of a client have in common."""

    api_key: str = ""
    timeout_s: float | None = None
    retries: Retries = field(default_factory=Retries)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trace:
    """The trace a call is part of.

    Source: W3C Trace Context.
    """

    traceparent: str

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return self.traceparent.split("-")[1]


def trace_of(traceparent: str | None) -> Trace:
    """The trace given; else that of OpenTelemetry's current span, where it is installed and there is one; else a new one."""
    if traceparent is not None:
        if len(traceparent.split("-")) != 4:
            raise ValueError(f"traceparent must be of the form 00-<trace id>-<span id>-<flags>; got {traceparent!r}")
        return Trace(traceparent)
    return Trace(_current_traceparent() or f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")


def _current_traceparent() -> str | None:
    try:
        from opentelemetry import propagate
    except ImportError:
        return None
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


def metadata_of(settings: Settings, trace: Trace) -> list[tuple[str, str]]:
    """What goes with a call beside its message."""
    found = [("traceparent", trace.traceparent), *settings.metadata.items()]
    if settings.api_key:
        found.append(("authorization", f"Bearer {settings.api_key}"))
    return found


def chat_request(model: str, messages: Sequence[Message], options: Mapping[str, Any]) -> inference.ChatRequest:
    """A conversation's message. Raises TypeError for an option that there is not."""
    request = inference.ChatRequest(model=model)
    for message in messages:
        request.prompt.messages.add(role=message.role, content=message.content, name=message.name)
    _fill(request, dict(options), {"add_generation_prompt", "continue_final_message"}, request.prompt)
    return request


def generate_request(model: str, prompt: str | Sequence[int], options: Mapping[str, Any]) -> inference.GenerateRequest:
    """A prompt's message. Raises TypeError for an option that there is not."""
    request = inference.GenerateRequest(model=model)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    _fill(request, dict(options), set(), None)
    return request


def _fill(request: Any, options: dict[str, Any], prompt_options: set[str], prompt: Any) -> None:
    """Put options where they belong, by the names the protos give them."""
    # Drawn here, so that a retry goes on along the same path.
    options.setdefault("seed", secrets.randbits(63))
    own = {one.name for one in request.DESCRIPTOR.fields} - {"model", "prompt", "text", "token_ids", "sampling", "stopping"}
    for name, value in options.items():
        if value is None:
            continue
        place = (
            request.sampling if name in _SAMPLING else
            request.stopping if name in _STOPPING else
            prompt if name in prompt_options else
            request if name in own else None
        )  # fmt: skip
        if place is None:
            raise TypeError(
                f"there is no option {name!r}; there are {', '.join(sorted({*_SAMPLING, *_STOPPING, *own, *prompt_options}))}"
            )
        one = place.DESCRIPTOR.fields_by_name[name]
        if one.is_repeated:
            getattr(place, name).extend([value] if isinstance(value, str) else value)
        elif one.message_type is not None:
            getattr(place, name).CopyFrom(value)
        else:
            setattr(place, name, value)


def tokenize_request(model: str, text: str | Sequence[Message]) -> inference.TokenizeRequest:
    """The message of a tokenize call."""
    if isinstance(text, str):
        return inference.TokenizeRequest(model=model, text=text)
    turns = [tokenizer.ChatMessage(role=one.role, content=one.content, name=one.name) for one in text]
    return inference.TokenizeRequest(model=model, chat=tokenizer.ChatPrompt(messages=turns))


def num_choices_of(request: Request) -> int:
    """Choices that a request asks for."""
    return request.num_choices if request.HasField("num_choices") else 1


def piece_of(message: inference.ChatResponse | inference.GenerateResponse) -> Piece:
    """A piece of an answer."""
    text = message.content if isinstance(message, inference.ChatResponse) else message.text
    usage = None
    if message.HasField("usage"):
        told = message.usage
        usage = Usage(told.num_prompt_tokens, told.num_output_tokens, told.num_cached_tokens)
    return Piece(text, tuple(message.token_ids), message.choice, _FINISH_REASONS.get(message.finish_reason), usage)


def deadline_of(timeout_s: float | None) -> float | None:
    """When a call that begins now must be over, on the monotonic clock."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def remaining_s(deadline_s: float | None) -> float | None:
    """Time left to a deadline, a moment at least."""
    return None if deadline_s is None else max(deadline_s - time.monotonic(), 0.001)
