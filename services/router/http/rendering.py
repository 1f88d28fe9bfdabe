"""What every protocol's answer must be able to do; each has its own file. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.errors import HeadraceError
from services.router.generation import OutputPiece


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_reasoning_tokens: int = 0


class Rendering(Protocol):
    """One answer on its way out.

    It is fed every piece of output, in order. What it gives back is the streamed form; from what it keeps it can make the whole
    form, so the two cannot differ.
    """

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """Further headers of an answer in one piece."""
        ...

    @property
    def stream_headers(self) -> list[tuple[bytes, bytes]]:
        """Head of a streamed answer."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether every choice has had its last piece."""
        ...

    def begin(self, usage: Usage) -> bytes:
        """What a stream opens with."""
        ...

    def add(self, piece: OutputPiece) -> bytes:
        """Take one piece of output; gives its streamed form."""
        ...

    def finish(self, usage: Usage) -> bytes:
        """What a stream closes with."""
        ...

    def fail(self, error: HeadraceError) -> bytes:
        """What a stream closes with that broke."""
        ...

    def whole(self, usage: Usage) -> bytes:
        """The answer in one piece."""
        ...
