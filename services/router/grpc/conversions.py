"""gRPC's messages to our requests and our errors to gRPC's statuses. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ReplicaDeadError,
    RequestAbortedError,
    RequestTooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from headrace.v1 import common_pb2 as common
from headrace.v1 import inference_pb2 as inference
from headrace.v1 import tokenizer_pb2 as tokenizer
from services.router.generation import (
    CONSTRAINT_KINDS,
    ChatTurn,
    Constraint,
    ConversationPrompt,
    EmbedRequest,
    GenerationRequest,
    OutputStream,
    Prompt,
    ReasoningOptions,
    Sampling,
    Speculative,
    Stopping,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    ToolCallDelta,
)
from services.router.grpc.tool_fields import calls_of, template_kwargs_of, tool_choice, tools_of
from services.router.limits import (
    MAX_INPUTS,
    MAX_MESSAGES,
    check_cache_salt,
    check_logprobs,
    check_num_choices,
    check_priority,
    check_reasoning_budget,
    check_sampling,
    check_speculative,
    check_stopping,
    check_token_ids,
    refuse,
)

CODE_KEY = "headrace-error-code"
PARAM_KEY = "headrace-error-param"
RETRY_KEY = "headrace-retry-after-ms"
DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "headrace"
REQUEST_ID_KEY = "x-request-id"

_STATUSES: tuple[tuple[type[HeadraceError], grpc.StatusCode], ...] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (RequestTooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceededError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RequestAbortedError, grpc.StatusCode.CANCELLED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (ReplicaDeadError, grpc.StatusCode.UNAVAILABLE),
)
_FINISH_REASONS = {
    "stop": common.FINISH_REASON_STOP,
    "tool_calls": common.FINISH_REASON_STOP,
    "length": common.FINISH_REASON_LENGTH,
}
_CONSTRAINT_KINDS: dict[int, str] = {
    common.CONSTRAINT_KIND_JSON_SCHEMA: "json_schema",
    common.CONSTRAINT_KIND_JSON_OBJECT: "json_object",
    common.CONSTRAINT_KIND_REGEX: "regex",
    common.CONSTRAINT_KIND_EBNF: "ebnf",
    common.CONSTRAINT_KIND_CHOICE: "choice",
    common.CONSTRAINT_KIND_STRUCTURAL_TAG: "structural_tag",
}
_SPECULATIVE_METHODS: dict[int, str | None] = {
    common.SPECULATIVE_METHOD_UNSPECIFIED: None,
    common.SPECULATIVE_METHOD_OFF: "off",
    common.SPECULATIVE_METHOD_NGRAM: "ngram",
    common.SPECULATIVE_METHOD_AUTO: "auto",
}


def status_of(error: HeadraceError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def metadata_of(error: HeadraceError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata of an error: its stable code, the field, when to come back; and all of it as `google.rpc.Status`."""
    found: list[tuple[str, str | bytes]] = [(CODE_KEY, error.code)]
    if error.param:
        found.append((PARAM_KEY, error.param))
    if isinstance(error, (OverloadedError, UnavailableError)):
        found.append((RETRY_KEY, str(int(error.retry_after_s * 1000))))
    found.append((DETAILS_KEY, rich_status(error).SerializeToString()))
    return tuple(found)


def rich_status(error: HeadraceError) -> status_pb2.Status:
    """An error with details that clients of any language can read.

    Source: google/rpc/status.proto and error_details.proto; gRPC carries them in the metadata `grpc-status-details-bin`.
    """
    status = status_pb2.Status(code=status_of(error).value[0], message=error.message)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=ERROR_DOMAIN)]
    if error.param:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, (OverloadedError, UnavailableError)):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(retry)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def generate_request(message: inference.GenerateRequest) -> GenerationRequest:
    """A Generate call, checked."""
    kind = message.WhichOneof("prompt")
    prompt: Prompt
    if kind == "text":
        if not message.text:
            refuse("text", "a non-empty string", message.text)
        prompt = TextPrompt(message.text)
    elif kind == "token_ids":
        prompt = TokenPrompt(check_token_ids("token_ids", list(message.token_ids.ids)))
    else:
        raise InvalidRequestError("one of text and token_ids is required", param="prompt")
    return _generation(message, prompt, skip_special_tokens=_optional(message, "skip_special_tokens", True))


def chat_request(message: inference.ChatRequest) -> GenerationRequest:
    """A Chat call, checked."""
    skip_special_tokens = _optional(message, "skip_special_tokens", True)
    generation = _generation(message, conversation(message.prompt, "prompt"), skip_special_tokens=skip_special_tokens)
    asked = message.reasoning
    budget = _optional(asked, "budget_tokens", None)
    check_reasoning_budget("reasoning.budget_tokens", budget)
    return replace(
        generation,
        tool_choice=tool_choice(_optional(message, "tool_choice", "auto")),
        parallel_tool_calls=_optional(message, "parallel_tool_calls", True),
        reasoning=ReasoningOptions(_optional(asked, "separate", True), _optional(asked, "stream", True), budget),
    )


def tokenize_prompt(message: inference.TokenizeRequest) -> Prompt:
    """What a Tokenize call wants encoded."""
    kind = message.WhichOneof("prompt")
    if kind == "chat":
        return conversation(message.chat, "chat")
    if kind == "text":
        return TextPrompt(message.text, _optional(message, "add_special_tokens", True))
    raise InvalidRequestError("one of text and chat is required", param="prompt")


def embed_request(message: inference.EmbedRequest) -> EmbedRequest:
    """An Embed call, checked as over HTTP."""
    if not 1 <= len(message.inputs) <= MAX_INPUTS:
        refuse("inputs", f"1 to {MAX_INPUTS} texts", f"{len(message.inputs)} of them")
    inputs: list[TextPrompt | TokenPrompt] = []
    for index, one in enumerate(message.inputs):
        name = f"inputs.{index}"
        if one.WhichOneof("input") == "token_ids":
            inputs.append(TokenPrompt(check_token_ids(name, list(one.token_ids.ids))))
        elif one.text:
            inputs.append(TextPrompt(one.text))
        else:
            raise InvalidRequestError(f"{name} must be a text or token_ids, not empty", param=name)
    dimensions: int | None = _optional(message, "dimensions", None)
    if dimensions == 0:
        refuse("dimensions", "at least 1", dimensions)
    return EmbedRequest(message.model, tuple(inputs), dimensions, param="inputs")


def conversation(chat: tokenizer.ChatPrompt, path: str) -> ConversationPrompt:
    """A conversation, checked as over HTTP."""
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        refuse(f"{path}.messages", f"1 to {MAX_MESSAGES} messages", f"{len(chat.messages)} of them")
    for index, turn in enumerate(chat.messages):
        if not turn.role:
            raise InvalidRequestError(f"{path}.messages.{index}.role is required", param=f"{path}.messages.{index}.role")
    is_continued = chat.continue_final_message
    if is_continued and chat.HasField("add_generation_prompt") and chat.add_generation_prompt:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message cannot both be true", param=f"{path}.continue_final_message"
        )
    return ConversationPrompt(
        tuple(_turn(turn, f"{path}.messages.{index}") for index, turn in enumerate(chat.messages)),
        add_generation_prompt=_optional(chat, "add_generation_prompt", not is_continued),
        continue_final_message=is_continued,
        tools=tools_of(chat.tools, f"{path}.tools"),
        template_kwargs=template_kwargs_of(chat.template_kwargs, f"{path}.template_kwargs"),
    )


def _turn(turn: tokenizer.ChatMessage, path: str) -> ChatTurn:
    calls = calls_of(turn.tool_calls, f"{path}.tool_calls")
    return ChatTurn(turn.role, turn.content, turn.name, calls, turn.tool_call_id, turn.reasoning)


def tool_call_deltas(deltas: Sequence[ToolCallDelta]) -> list[inference.ToolCallDelta]:
    """Parts of tool calls as their messages."""
    return [inference.ToolCallDelta(index=delta.index, id=delta.id, name=delta.name, arguments=delta.arguments) for delta in deltas]


def finish_reason_of(name: str | None) -> common.FinishReason:
    """The enum's value of a finish reason."""
    return _FINISH_REASONS[name] if name is not None else common.FINISH_REASON_UNSPECIFIED


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[inference.TokenLogprob]:
    """Logprobs as their messages."""
    return [
        inference.TokenLogprob(
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob,
            top=[inference.LikelyToken(token_id=token_id, text=text, logprob=logprob) for token_id, text, logprob in token.top],
        )
        for token in tokens
    ]


def usage_of(stream: OutputStream) -> inference.Usage:
    """Token counts of a stream."""
    return inference.Usage(
        num_prompt_tokens=stream.num_prompt_tokens,
        num_output_tokens=stream.num_output_tokens,
        num_cached_tokens=stream.num_cached_tokens,
        num_reasoning_tokens=stream.num_reasoning_tokens,
    )


def _generation(
    message: inference.GenerateRequest | inference.ChatRequest, prompt: Prompt, *, skip_special_tokens: bool
) -> GenerationRequest:
    asked, stops = message.sampling, message.stopping
    sampling = Sampling(
        temperature=_optional(asked, "temperature", None),
        top_p=_optional(asked, "top_p", None),
        top_k=_optional(asked, "top_k", None),
        min_p=_optional(asked, "min_p", None),
        seed=_optional(asked, "seed", None),
        frequency_penalty=_optional(asked, "frequency_penalty", None),
        presence_penalty=_optional(asked, "presence_penalty", None),
        repetition_penalty=_optional(asked, "repetition_penalty", None),
        logit_bias=tuple((entry.token_id, entry.bias) for entry in asked.logit_bias),
    )
    stopping = Stopping(
        max_tokens=_optional(stops, "max_tokens", None),
        min_tokens=stops.min_tokens,
        ignore_eos=stops.ignore_eos,
        stop=tuple(stops.stop),
        stop_token_ids=tuple(stops.stop_token_ids),
        include_stop_in_output=stops.include_stop_in_output,
    )
    check_sampling(sampling)
    check_stopping(stopping)
    check_priority(message.priority)
    salt = check_cache_salt(_optional(message, "cache_salt", None))
    num_choices = _optional(message, "num_choices", 1)
    check_num_choices("num_choices", num_choices)
    logprobs, prompt_logprobs = _optional(message, "logprobs", None), _optional(message, "prompt_logprobs", None)
    check_logprobs("logprobs", logprobs)
    check_logprobs("prompt_logprobs", prompt_logprobs)
    return GenerationRequest(
        message.model,
        prompt,
        sampling,
        stopping,
        skip_special_tokens,
        message.priority,
        salt,
        num_choices=num_choices,
        speculative=_speculative(message.speculative),
        constraint=_constraint(message.constraint) if message.HasField("constraint") else None,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _constraint(asked: common.Constraint) -> Constraint:
    # A number that this version does not know is refused by its number, and so is the form that only tokenizers make.
    kind = _CONSTRAINT_KINDS.get(asked.kind, str(asked.kind))
    if kind not in CONSTRAINT_KINDS:
        refuse("constraint.kind", f"one of {', '.join(CONSTRAINT_KINDS)}", kind)
    if (kind == "json_object") == bool(asked.source):
        refuse("constraint.source", "given, unless the kind is json_object", asked.source)
    return Constraint(kind, asked.source, "constraint")


def _speculative(asked: common.SpeculativeParams) -> Speculative:
    # A number that this version does not know is refused by its number.
    method = _SPECULATIVE_METHODS.get(asked.method, str(asked.method))
    speculative = Speculative(method, _optional(asked, "num_speculative_tokens", None))
    check_speculative(speculative)
    return speculative


_Default = TypeVar("_Default")


def _optional(message: object, name: str, default: _Default) -> _Default:
    """An optional field's value, or the default where it is absent."""
    if message.HasField(name):  # type: ignore[attr-defined]
        return getattr(message, name)  # type: ignore[no-any-return]
    return default
