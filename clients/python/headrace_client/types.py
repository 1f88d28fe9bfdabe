"""What goes into calls and comes out of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes of a tool.

    Attributes:
        id: By which the tool's turn answers it.
        name: The function.
        arguments: JSON, as the model wrote it.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user", "assistant", "tool", or what else the model's template knows.
        tool_calls: Of an assistant's turn.
        tool_call_id: In a tool's turn, the call that it answers.
        reasoning: Of an assistant's turn.
    """

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""


def system(content: str) -> Message:
    """What the assistant is told beforehand."""
    return Message("system", content)


def user(content: str, name: str = "") -> Message:
    """What a user says."""
    return Message("user", content, name)


def assistant(content: str = "", *, tool_calls: Iterable[ToolCall] = (), reasoning: str = "") -> Message:
    """What the assistant said before, and the tools it called."""
    return Message("assistant", content, tool_calls=tuple(tool_calls), reasoning=reasoning)


def tool(content: str, tool_call_id: str = "", *, name: str = "") -> Message:
    """What a tool gave back to a call."""
    return Message("tool", content, name, tool_call_id=tool_call_id)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: of the prompt, made, of the prompt those that were cached, and of those made the reasoning's."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A new part of a tool call.

    Attributes:
        index: Which of the choice's calls, from 0.
        id: The call's id; in its first delta only.
        name: The function; in its first delta only.
        arguments: New characters of the arguments' JSON.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """A token and how likely it was. Its text is bytes: they may be a part of a character."""

    token_id: int
    text: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, and the likeliest in its place, most likely first.

    Attributes:
        logprob: Natural logarithm; None for the first token of a prompt.
    """

    token_id: int
    text: bytes
    logprob: float | None
    top: tuple[LikelyToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """New output of one choice.

    Attributes:
        finish_reason: In the last piece of a choice: "stop", "length", "abort" or "error".
        usage: In the last piece of all.
        logprobs: Of each of `token_ids`, where they were asked for.
        prompt_logprobs: Of the prompt's tokens, in the first piece of a choice, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Reply:
    """A whole answer. Lists have one entry a choice.

    Attributes:
        texts: What was said.
        token_ids: All that was made, in tokens.
        finish_reasons: "stop", "length", "abort" or "error".
        usage: Tokens of all choices together.
        request_id: Its id in the server's logs.
        trace_id: Of the trace that the call is part of, 32 hex digits.
        reasonings: What was thought before.
        tool_calls: The calls, whole.
        logprobs: Of each of `token_ids`; empty where nobody asked.
        prompt_logprobs: Of the prompt's tokens; empty where nobody asked.
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    usage: Usage | None = None
    request_id: str = ""
    trace_id: str = ""
    reasonings: list[str] = field(default_factory=list)
    tool_calls: list[list[ToolCall]] = field(default_factory=list)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """That of the first choice."""
        return self.texts[0]

    @property
    def reasoning(self) -> str:
        """That of the first choice."""
        return self.reasonings[0]

    @property
    def finish_reason(self) -> str:
        """That of the first choice."""
        return self.finish_reasons[0]

    @classmethod
    def empty(cls, num_choices: int) -> Reply:
        """To be filled by `add`."""
        choices = range(num_choices)
        return cls(
            texts=[""] * num_choices,
            token_ids=[[] for _ in choices],
            finish_reasons=[""] * num_choices,
            reasonings=[""] * num_choices,
            tool_calls=[[] for _ in choices],
            logprobs=[[] for _ in choices],
            prompt_logprobs=[[] for _ in choices],
        )

    def add(self, piece: Piece) -> None:
        """Take a piece in."""
        choice = piece.choice
        self.texts[choice] += piece.text
        self.token_ids[choice] += piece.token_ids
        self.finish_reasons[choice] = piece.finish_reason or self.finish_reasons[choice]
        self.usage = piece.usage or self.usage
        self.reasonings[choice] += piece.reasoning
        self.logprobs[choice] += piece.logprobs
        self.prompt_logprobs[choice] += piece.prompt_logprobs
        for delta in piece.tool_calls:
            _add_delta(self.tool_calls[choice], delta)


def _add_delta(calls: list[ToolCall], delta: ToolCallDelta) -> None:
    """Join a part to its call."""
    calls.extend(ToolCall("", "", "") for _ in range(len(calls), delta.index + 1))
    call = calls[delta.index]
    calls[delta.index] = replace(
        call, id=call.id or delta.id, name=call.name or delta.name, arguments=call.arguments + delta.arguments
    )


@dataclass(frozen=True, slots=True)
class EmbedReply:
    """Vectors of texts.

    Attributes:
        embeddings: One vector a text, in their order.
        num_prompt_tokens: Tokens of all texts together.
        request_id: The call's id in the server's logs.
        trace_id: Of the trace that the call is part of, 32 hex digits.
    """

    embeddings: list[list[float]]
    num_prompt_tokens: int
    request_id: str = ""
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class EmbeddingInfo:
    """What vectors a model makes.

    Attributes:
        size: Numbers in a vector.
        is_matryoshka: Vectors can be cut to fewer `dimensions`.
        dimensions: Sizes to which they can be cut; empty for any.
    """

    size: int
    is_matryoshka: bool = False
    dimensions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for. `embedding` is None for one that generates text."""

    name: str
    max_model_len: int
    loaded_unix_s: int = 0
    embedding: EmbeddingInfo | None = None
