"""Request shapes of OpenAI's Responses API, checked at the edge. Pure; items stand in items.py, answers in answers.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.errors import InvalidRequestError
from services.router.generation import (
    Constraint,
    ConversationPrompt,
    GenerationRequest,
    ReasoningOptions,
    Sampling,
    Stopping,
    Tool,
    ToolChoice,
)
from services.router.http.openai_messages import template_kwargs
from services.router.http.responses.items import UNIONS, InputItem, Item, MessageItem, named_messages, turns_of
from services.router.http.structured import schema_source
from services.router.http.validation import Body, drop_unused, load_object, renamed_fields, validate
from services.router.limits import MAX_MESSAGES, check_sampling, check_stopping, refuse

IGNORED_FIELDS = frozenset(
    {
        "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "max_tool_calls", "access_programs", "background_options",
    }
)  # fmt: skip
"""Accepted and without effect here: they steer OpenAI's own accounts and caches, or tools that OpenAI runs."""
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "prompt": (None,),
    "moderation": (None,),
    "image": (None,),
    "context_management": (None, []),
    "truncation": (None, "disabled"),
}
MAX_TOOLS = 128
MAX_METADATA = 16
_INCLUDES = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]
_UNIONS = {**UNIONS, "tool_choice": '"none", "auto", "required" or {"type": "function", "name": …}', "conversation": "an id"}


class Query(BaseModel):
    """Values of a query string: text, converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PageQuery(Query):
    """Which part of a list is wanted."""

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"


class RetrieveQuery(Query):
    """How a response is wanted back."""

    stream: bool = False
    starting_after: int | None = Field(None, ge=0)
    include_obfuscation: bool = False


class FunctionTool(Body):
    """A tool of the client's."""

    type: Literal["function"]
    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    name: str


class PlainFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON that is valid by a schema."""

    type: Literal["json_schema"]
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


TextFormat = Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ReasoningShape(Body):
    """How much the model reasons first."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="Ignored: reasoning is told as it is.")
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="Ignored.")


class TextOptions(Body):
    """Form of the answer's text."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Ignored.")


class StreamOptions(Body):
    """Form of the stream."""

    include_obfuscation: bool = Field(False, description="Ignored.")


class ConversationName(Body):
    """A conversation by its id."""

    id: str


class CreateBody(Body):
    """Body of POST /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES)] = Field(description="Text, or items.")
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationName | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[_INCLUDES] | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningShape | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    user: str | None = None


class ConversationBody(Body):
    """Body of POST /v1/conversations."""

    items: list[InputItem] | None = Field(None, max_length=MAX_MESSAGES)
    metadata: dict[str, str] | None = None


class UpdateBody(Body):
    """Body of POST /v1/conversations/{id}."""

    metadata: dict[str, str] | None


class ItemsBody(Body):
    """Body of POST /v1/conversations/{id}/items."""

    items: list[InputItem] = Field(min_length=1, max_length=MAX_MESSAGES)


@dataclass(frozen=True, slots=True)
class ResponseCall:
    """A checked call of POST /v1/responses. What came before it is the store's to say."""

    body: CreateBody
    items: Sequence[InputItem]
    conversation_id: str | None
    tool_choice: ToolChoice

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept."""
        return self.body.store is not False

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each; None where no logprobs are wanted."""
        wanted = "message.output_text.logprobs" in (self.body.include or ())
        return (self.body.top_logprobs or 0) if wanted else None

    def generation(self, items: Sequence[Item]) -> GenerationRequest:
        """What to generate.

        Args:
            items: Everything before the answer, oldest first.

        Raises:
            InvalidRequestError: The items make no conversation.
        """
        body = self.body
        turns = turns_of(items)
        if not turns:
            raise InvalidRequestError("input must hold a message", param="input")
        if body.instructions:
            # They come first, and are not handed on to later responses.
            turns = turns_of([{"type": "message", "role": "system", "content": body.instructions}]) + turns
        tools = tuple(
            Tool(tool.name, tool.description or "", tool.parameters, is_strict=tool.strict is True) for tool in body.tools or ()
        )
        effort = None if body.reasoning is None else body.reasoning.effort
        return GenerationRequest(
            body.model or "",
            ConversationPrompt(tuple(turns), tools=tools, template_kwargs=template_kwargs(None, effort)),
            Sampling(body.temperature, body.top_p),
            Stopping(max_tokens=body.max_output_tokens),
            tool_choice=self.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning=ReasoningOptions(),
            constraint=_constraint(body.text),
            logprobs=self.num_top_logprobs,
        )


def parse_create(body: bytes) -> ResponseCall:
    """Read a body of POST /v1/responses.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    value = drop_unused(load_object(body), _NOT_SERVED, ignored=IGNORED_FIELDS)
    asked = validate(CreateBody, {**value, "input": named_messages(value["input"])} if "input" in value else value, unions=_UNIONS)
    with renamed_fields({"max_tokens": "max_output_tokens"}):
        check_sampling(Sampling(asked.temperature, asked.top_p))
        check_stopping(Stopping(max_tokens=asked.max_output_tokens))
    check_metadata(asked.metadata)
    if asked.previous_response_id is not None and asked.conversation is not None:
        raise InvalidRequestError("previous_response_id and conversation cannot both be given", param="conversation")
    if asked.background is True and asked.store is False:
        refuse("store", "true for a background response, which is fetched later", False)
    if asked.stream_options is not None and asked.stream is not True:
        refuse("stream_options", "left out unless stream is true", asked.stream_options.model_dump())
    if asked.top_logprobs and "message.output_text.logprobs" not in (asked.include or ()):
        refuse("top_logprobs", "0 unless include has message.output_text.logprobs", asked.top_logprobs)
    items = [MessageItem(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
    if not items or asked.input == "":
        refuse("input", "a non-empty string or array", asked.input)
    conversation = asked.conversation.id if isinstance(asked.conversation, ConversationName) else asked.conversation
    return ResponseCall(asked, items, conversation, _tool_choice(asked))


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Refuse metadata over OpenAI's limits."""
    if metadata is None:
        return
    if len(metadata) > MAX_METADATA:
        refuse("metadata", f"at most {MAX_METADATA} pairs", f"{len(metadata)} of them")
    for key, text in metadata.items():
        if not 1 <= len(key) <= 64 or len(text) > 512:
            refuse("metadata", "keys of 1 to 64 characters and values of at most 512", key)


def _tool_choice(asked: CreateBody) -> ToolChoice:
    names = [tool.name for tool in asked.tools or ()]
    for index, name in enumerate(names):
        if name in names[:index]:
            refuse(f"tools.{index}.name", "different from the names of the other tools", name)
    choice = asked.tool_choice
    if choice is None:
        return ToolChoice()
    if isinstance(choice, NamedTool):
        if choice.name not in names:
            refuse("tool_choice.name", "the name of one of the tools", choice.name)
        return ToolChoice("named", choice.name)
    if choice == "required" and not names:
        refuse("tool_choice", "auto or none without tools", choice)
    return ToolChoice(choice)


def _constraint(text: TextOptions | None) -> Constraint | None:
    form = None if text is None else text.format
    if isinstance(form, SchemaFormat):
        return Constraint("json_schema", schema_source(form.schema_), param="text.format.schema")
    return Constraint("json_object", param="text.format") if isinstance(form, ObjectFormat) else None
