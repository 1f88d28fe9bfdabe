"""Anthropic's request shapes, checked at the edge and turned into our own. Pure; answers are rendered in `anthropic_answers.py`.

A turn of theirs is a list of blocks. What a user's turn holds of tool results becomes turns of the tool; an assistant's turn at the
end is one to be continued.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from headrace.errors import InvalidRequestError
from services.router.generation import (
    ChatTurn,
    Constraint,
    ConversationPrompt,
    GenerationRequest,
    ReasoningOptions,
    Sampling,
    Stopping,
    Tool,
    ToolCall,
    ToolChoice,
)
from services.router.http.structured import schema_source
from services.router.http.validation import Body, drop_unused, load_object, renamed_fields, validate
from services.router.limits import MAX_MESSAGES, check_sampling, check_stopping, refuse

_VERSION = re.compile(r"20\d\d-[01]\d-[0-3]\d", re.ASCII)
IGNORED_FIELDS = frozenset(
    {"service_tier", "inference_geo", "speed", "cache_control", "diagnostics", "user_profile_id", "workspace_id", "betas"}
)
"""Accepted and without effect here: they steer Anthropic's own accounts, caches and hardware."""
_NOT_SERVED: dict[str, tuple[object, ...]] = {"container": (None,), "mcp_servers": (None, []), "context_management": (None,)}
_UNIONS = {"content": "a string or an array of blocks", "system": "a string or an array of text blocks"}
MAX_TOOLS = 128
MAX_BLOCKS = 4096


class _Cached(Body):
    cache_control: dict[str, Any] | None = Field(None, description="Ignored: prefixes are cached without being asked.")


class TextBlock(_Cached):
    """Text."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = Field(None, max_length=0, description="Not served: null or empty.")


class ThinkingBlock(Body):
    """Reasoning of an earlier answer, given back."""

    type: Literal["thinking"]
    thinking: str
    signature: str = Field("", description="Not looked at.")


class RedactedThinkingBlock(Body):
    """Reasoning that nobody can read; left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Cached):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=128)
    input: dict[str, Any]
    caller: dict[str, Any] | None = Field(None, description="Ignored.")


class ToolResultBlock(_Cached):
    """What a tool call gave."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Message(Body):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class ToolShape(_Cached):
    """A tool of the client's."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = Field(None, description="Ignored: arguments are always streamed as they come.")


class ToolChoiceShape(Body):
    """What the model must do with its tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model reasons first, and how much."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = Field(None, description="Ignored: reasoning is told as it is.")


class OutputFormat(Body):
    """A JSON Schema that the answer must be valid by."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """Form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Body):
    """Who asks."""

    user_id: str | None = None


class CountTokensBody(Body):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | list[TextBlock] | None = None
    tools: list[ToolShape] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoiceShape | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountTokensBody):
    """Body of POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None


@dataclass(frozen=True, slots=True)
class MessagesCall:
    """A call of /v1/messages."""

    generation: GenerationRequest
    stop_sequences: tuple[str, ...]
    user: str | None
    is_streaming: bool


def check_version(version: str | None) -> None:
    """Refuse what is no version of the API. What is served here is the same in all of them."""
    if version is not None and not _VERSION.fullmatch(version):
        refuse("anthropic-version", "a date such as 2023-06-01", version)


def parse_messages(body: bytes) -> MessagesCall:
    """Read a body of POST /v1/messages.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    asked = validate(MessagesBody, _drop(load_object(body)), unions=_UNIONS)
    stops = tuple(asked.stop_sequences or ())
    sampling = Sampling(asked.temperature, asked.top_p, asked.top_k)
    # The stop string stays in the output so that the answer can say which one it was.
    stopping = Stopping(max_tokens=asked.max_tokens, stop=stops, include_stop_in_output=bool(stops))
    with renamed_fields({"stop": "stop_sequences"}):
        check_sampling(sampling)
        check_stopping(stopping)
    choice, is_parallel = _tool_choice(asked)
    generation = GenerationRequest(
        asked.model,
        _conversation(asked),
        sampling,
        stopping,
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
        reasoning=ReasoningOptions(budget_tokens=_budget(asked.thinking, asked.max_tokens)),
        constraint=_constraint(asked.output_config),
    )
    user = None if asked.metadata is None else asked.metadata.user_id
    return MessagesCall(generation, stops, user, asked.stream is True)


def parse_count_tokens(body: bytes) -> tuple[str, ConversationPrompt]:
    """Read a body of POST /v1/messages/count_tokens: the model and what it would read."""
    asked = validate(CountTokensBody, _drop(load_object(body)), unions=_UNIONS)
    _tool_choice(asked)
    return asked.model, _conversation(asked)


def _constraint(config: OutputConfig | None) -> Constraint | None:
    if config is None or config.format is None:
        return None
    return Constraint("json_schema", schema_source(config.format.schema_), param="output_config.format.schema")


def _drop(body: dict[str, Any]) -> dict[str, Any]:
    return drop_unused(body, _NOT_SERVED, ignored=IGNORED_FIELDS)


def _budget(thinking: Thinking | None, max_tokens: int) -> int | None:
    if thinking is None:
        return None
    if thinking.type != "enabled":
        if thinking.budget_tokens is not None:
            refuse("thinking.budget_tokens", "left out unless thinking.type is enabled", thinking.budget_tokens)
        return None
    if thinking.budget_tokens is None:
        raise InvalidRequestError(
            "thinking.budget_tokens is required where thinking.type is enabled", param="thinking.budget_tokens"
        )
    if thinking.budget_tokens >= max_tokens:
        refuse("thinking.budget_tokens", f"less than max_tokens, {max_tokens}", thinking.budget_tokens)
    return thinking.budget_tokens


def _tool_choice(asked: CountTokensBody) -> tuple[ToolChoice, bool]:
    names = [tool.name for tool in asked.tools or ()]
    for index, name in enumerate(names):
        if name in names[:index]:
            refuse(f"tools.{index}.name", "different from the names of the other tools", name)
    choice = asked.tool_choice
    if choice is None:
        return ToolChoice(), True
    is_parallel = choice.disable_parallel_tool_use is not True
    if (choice.type == "tool") != (choice.name is not None):
        refuse("tool_choice.name", "given where tool_choice.type is tool, and only there", choice.name)
    if choice.type in ("any", "tool") and not names:
        refuse("tool_choice", "auto or none without tools", choice.type)
    if choice.name is not None:
        if choice.name not in names:
            refuse("tool_choice.name", "the name of one of the tools", choice.name)
        return ToolChoice("named", choice.name), is_parallel
    return ToolChoice("required" if choice.type == "any" else "none" if choice.type == "none" else "auto"), is_parallel


def _conversation(asked: CountTokensBody) -> ConversationPrompt:
    turns: list[ChatTurn] = []
    if asked.system:
        turns.append(ChatTurn("system", asked.system if isinstance(asked.system, str) else _text(asked.system)))
    calls: dict[str, str] = {}
    for index, message in enumerate(asked.messages):
        path = f"messages.{index}.content"
        if message.role == "assistant":
            _append(turns, _assistant_turn(path, message.content, calls))
        else:
            for turn in _user_turns(path, message.content, calls):
                _append(turns, turn)
    is_continued = asked.messages[-1].role == "assistant"
    if is_continued and turns[-1].tool_calls:
        path = f"messages.{len(asked.messages) - 1}.content"
        raise InvalidRequestError(f"{path} holds a tool_use block, which a tool_result block must follow", param=path)
    tools = tuple(
        Tool(tool.name, tool.description or "", tool.input_schema, is_strict=tool.strict is True) for tool in asked.tools or ()
    )
    return ConversationPrompt(
        tuple(turns),
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
        tools=tools,
        template_kwargs=_template_kwargs(asked),
    )


def _template_kwargs(asked: CountTokensBody) -> dict[str, Any]:
    # Theirs do not reason unless they are asked to.
    found: dict[str, Any] = {"enable_thinking": asked.thinking is not None and asked.thinking.type != "disabled"}
    effort = None if asked.output_config is None else asked.output_config.effort
    if effort is not None:
        found["reasoning_effort"] = effort if effort in ("low", "medium") else "high"
    return found


def _append(turns: list[ChatTurn], turn: ChatTurn) -> None:
    """Add a turn; of two users' turns in a row templates would make an error, and Anthropic makes one turn."""
    before = turns[-1] if turns else None
    if before is not None and before.role == turn.role == "user":
        turns[-1] = ChatTurn("user", f"{before.content}\n{turn.content}")
    else:
        turns.append(turn)


def _user_turns(path: str, content: str | list[Block], calls: dict[str, str]) -> list[ChatTurn]:
    if isinstance(content, str):
        return [ChatTurn("user", content)]
    _check_blocks(path, content, ("text", "tool_result"), "user")
    turns = []
    texts = []
    for index, block in enumerate(content):
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock):
            name = calls.get(block.tool_use_id)
            if name is None:
                refuse(f"{path}.{index}.tool_use_id", "the id of a tool_use block before it", block.tool_use_id)
            told = block.content if isinstance(block.content, str) else _text(block.content or ())
            turns.append(ChatTurn("tool", f"Error: {told}" if block.is_error else told, name=name, tool_call_id=block.tool_use_id))
    if texts:
        turns.append(ChatTurn("user", _text(texts)))
    return turns


def _assistant_turn(path: str, content: str | list[Block], calls: dict[str, str]) -> ChatTurn:
    if isinstance(content, str):
        return ChatTurn("assistant", content)
    _check_blocks(path, content, ("text", "thinking", "redacted_thinking", "tool_use"), "assistant")
    made = []
    for index, block in enumerate(content):
        if isinstance(block, ToolUseBlock):
            if block.id in calls:
                refuse(f"{path}.{index}.id", "different from the ids of other tool_use blocks", block.id)
            calls[block.id] = block.name
            made.append(ToolCall(block.id, block.name, orjson.dumps(block.input).decode()))
    reasoning = "".join(block.thinking for block in content if isinstance(block, ThinkingBlock))
    text = _text([block for block in content if isinstance(block, TextBlock)])
    return ChatTurn("assistant", text, tool_calls=tuple(made), reasoning=reasoning)


def _check_blocks(path: str, content: Sequence[Block], allowed: tuple[str, ...], role: str) -> None:
    if not 1 <= len(content) <= MAX_BLOCKS:
        refuse(path, f"1 to {MAX_BLOCKS} blocks", f"{len(content)} of them")
    for index, block in enumerate(content):
        if block.type not in allowed:
            refuse(f"{path}.{index}.type", f"one of {', '.join(allowed)} in a turn of the {role}", block.type)


def _text(blocks: Sequence[TextBlock]) -> str:
    return "".join(block.text for block in blocks)
