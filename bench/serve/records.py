"""What is kept of one request, and the figures that follow from it alone. Pure data; times are monotonic nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class RequestSpec:
    """One request to send: a plain prompt or a list of chat messages, and how many output tokens to ask for."""

    index: int
    prompt: str | list[dict[str, Any]]
    num_output_tokens: int


@dataclass
class RequestRecord:
    """One request as the client saw it.

    `chunk_times_ns` holds the arrival of every chunk that carried output text, `pieces` the text of completions. `usage_*` are the
    server's own counts, `None` where it sent none. `error_kind` is `None` for a request that ended well.
    """

    index: int
    started_ns: int
    ended_ns: int = 0
    late_ns: int = 0
    chunk_times_ns: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    usage_prompt_tokens: int | None = None
    usage_output_tokens: int | None = None
    usage_cached_tokens: int | None = None
    finish_reason: str | None = None
    error_kind: str | None = None
    error_message: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the request ended without an error."""
        return self.error_kind is None

    @property
    def num_output_tokens(self) -> int:
        """The server's count, or else the number of chunks that carried text."""
        return len(self.chunk_times_ns) if self.usage_output_tokens is None else self.usage_output_tokens

    @property
    def text(self) -> str:
        """The output of a completion; kept for who goes on with it, and never written to a result."""
        return "".join(self.pieces)

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first chunk with output text; `None` when there was none."""
        return (self.chunk_times_ns[0] - self.started_ns) / 1e6 if self.chunk_times_ns else None

    @property
    def e2e_ms(self) -> float:
        """Time from sending the request to the end of the stream."""
        return (self.ended_ns - self.started_ns) / 1e6

    @property
    def itl_ms(self) -> list[float]:
        """Every gap between two consecutive chunks with output text."""
        return [(after - before) / 1e6 for before, after in pairwise(self.chunk_times_ns)]

    @property
    def tpot_ms(self) -> float | None:
        """(e2e - TTFT) / (output tokens - 1): the mean time an output token after the first; `None` below two tokens."""
        if self.ttft_ms is None or self.num_output_tokens <= 1:
            return None
        return (self.e2e_ms - self.ttft_ms) / (self.num_output_tokens - 1)

    def as_json(self, *, origin_ns: int) -> dict[str, Any]:
        """The record for the result file, with its start relative to `origin_ns`."""
        return {
            "index": self.index,
            "start_ms": round((self.started_ns - origin_ns) / 1e6, 3),
            "late_ms": round(self.late_ns / 1e6, 3),
            "ttft_ms": None if self.ttft_ms is None else round(self.ttft_ms, 3),
            "e2e_ms": round(self.e2e_ms, 3),
            "itl_ms": [round(gap, 3) for gap in self.itl_ms],
            "num_prompt_tokens": self.usage_prompt_tokens,
            "num_cached_tokens": self.usage_cached_tokens,
            "num_output_tokens": self.num_output_tokens,
            "output_tokens_from": "chunks" if self.usage_output_tokens is None else "usage",
            "finish_reason": self.finish_reason,
            "error_kind": self.error_kind,
            "error_message": self.error_message,
        }
