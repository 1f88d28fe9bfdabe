"""How calls are made: their deadlines, retries and traces."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace_client.errors import HeadraceError, OverloadedError, UnavailableError

# What was asked for is read, however long: logprobs of a prompt come in one message, and gRPC would end at 4 MiB.
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)


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


def deadline_of(timeout_s: float | None) -> float | None:
    """When a call that begins now must be over, on the monotonic clock."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def remaining_s(deadline_s: float | None) -> float | None:
    """Time left to a deadline, a moment at least."""
    return None if deadline_s is None else max(deadline_s - time.monotonic(), 0.001)
