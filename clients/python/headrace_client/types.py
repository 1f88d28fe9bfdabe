"""What goes into calls and comes out of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    name: str = ""


def system(content: str) -> Message:
    """What the assistant is told beforehand."""
    return Message("system", content)


def user(content: str, name: str = "") -> Message:
    """What a user says."""
    return Message("user", content, name)


def assistant(content: str) -> Message:
    """What the assistant said before."""
    return Message("assistant", content)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: of the prompt, made, and of the prompt those that were cached."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """New output of one choice; its last one has a finish reason, "stop" or "length", and the last of all the usage."""

    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(slots=True)
class Reply:
    """A whole answer.

    Attributes:
        texts: One a choice.
        token_ids: The same in tokens.
        finish_reasons: "stop" or "length", one a choice.
        request_id: Its id in the server's logs.
        trace_id: Of the trace that the call is part of, 32 hex digits.
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    usage: Usage | None = None
    request_id: str = ""
    trace_id: str = ""

    @property
    def text(self) -> str:
        """That of the first choice."""
        return self.texts[0]

    @property
    def finish_reason(self) -> str:
        """That of the first choice."""
        return self.finish_reasons[0]

    @classmethod
    def empty(cls, num_choices: int) -> Reply:
        """To be filled by `add`."""
        return cls([""] * num_choices, [[] for _ in range(num_choices)], [""] * num_choices)

    def add(self, piece: Piece) -> None:
        """Take a piece in."""
        self.texts[piece.choice] += piece.text
        self.token_ids[piece.choice] += piece.token_ids
        self.finish_reasons[piece.choice] = piece.finish_reason or self.finish_reasons[piece.choice]
        self.usage = piece.usage or self.usage


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    max_model_len: int
    loaded_unix_s: int = field(default=0)
