"""OpenAI's request shapes, checked at the edge and turned into our own.

Pure: bytes in, `GenerationRequest` out, or one error that names the field, the limit and the value. Unknown fields are errors
with a suggestion. Fields that every OpenAI client sends are accepted at the value that means "not used"; those OpenAI keeps for its
own books (`IGNORED_FIELDS`) are accepted and ignored. Answers are rendered in `openai_answers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field

from headrace.errors import InvalidRequestError
from services.router.generation import (
    GenerationRequest,
    Prompt,
    ReasoningOptions,
    Sampling,
    Speculative,
    Stopping,
    TextPrompt,
    TokenPrompt,
)
from services.router.http.openai_messages import (
    NamedTool,
    ToolShape,
    conversation,
    refuse_functions,
    template_kwargs,
    tool_choice,
)
from services.router.http.structured import FIELDS as CONSTRAINT_FIELDS
from services.router.http.structured import constraint_of
from services.router.http.validation import Body, drop_unused, load_object, validate
from services.router.limits import (
    MAX_MESSAGES,
    check_best_of,
    check_cache_salt,
    check_logprobs,
    check_num_choices,
    check_num_sequences,
    check_priority,
    check_reasoning_budget,
    check_sampling,
    check_speculative,
    check_stopping,
    check_token_ids,
    refuse,
)

_Model = TypeVar("_Model", bound=BaseModel)

IGNORED_FIELDS = frozenset({"metadata", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_retention"})
"""Accepted and without effect here: they steer OpenAI's own accounts and caches, or features that are off."""

_NOT_YET: dict[str, tuple[object, ...]] = {
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "store": (None, False),
    "moderation": (None,),
    "chat_template": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
}
"""Fields we know and cannot honour yet, with the values at which they ask for nothing."""

_UNIONS = {
    "stop": "a string or an array of strings",
    "prompt": "a string, an array of token ids, or an array of either",
    "tool_choice": '"none", "auto", "required" or {"type": "function", "function": {"name": …}}',
}
_ID_DIGITS = 10


class _StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class _Speculative(Body):
    method: str | None = None
    num_speculative_tokens: int | None = None


class _Shared(Body):
    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    user: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    speculative: _Speculative | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class _Chat(_Shared):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[ToolShape] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    reasoning_budget_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Completion(_Shared):
    prompt: str | list[Any]
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class _Tokenize(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[ToolShape] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Detokenize(Body):
    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool | None = None


SHAPES: dict[str, type[Body]] = {
    "chat": _Chat,
    "completion": _Completion,
    "tokenize": _Tokenize,
    "detokenize": _Detokenize,
}
"""Shapes of bodies, for the API's description."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request and how its answer is to be sent.

    Attributes:
        generation: What is to be done, for the first prompt.
        user: Who asks, as the body says.
        is_streaming: In chunks, instead of one piece.
        include_usage: With a last chunk that has the usage.
        has_running_usage: With the usage so far in every chunk.
        other_prompts: Those after the first; each has as many choices.
        num_best: Choices to give of each prompt's: those that are likeliest a token. None for all.
        keeps_logprobs: Logprobs of the output are told, and not only looked at.
        tells_prompt: Logprobs of the prompt are told beside the output.
        echo: Give the prompt before the output.
        drop_output: Give the prompt alone.
    """

    generation: GenerationRequest
    user: str | None
    is_streaming: bool
    include_usage: bool
    has_running_usage: bool = False
    other_prompts: tuple[Prompt, ...] = ()
    num_best: int | None = None
    keeps_logprobs: bool = False
    tells_prompt: bool = False
    echo: bool = False
    drop_output: bool = False

    @property
    def num_choices(self) -> int:
        """Choices of the answer, over all prompts."""
        num_best = self.generation.num_choices if self.num_best is None else self.num_best
        return num_best * (1 + len(self.other_prompts))


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """A call of /tokenize."""

    model: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class DetokenizeCall:
    """A call of /detokenize."""

    model: str
    token_ids: list[int]
    skip_special_tokens: bool


def parse_chat(body: bytes) -> ParsedRequest:
    """Read a body of POST /v1/chat/completions.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    chat = _validate(_Chat, _drop_unused(load_object(body)))
    refuse_functions(chat.functions, chat.function_call)
    prompt = conversation(
        chat.messages,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final=chat.continue_final_message,
        tools=chat.tools,
        template_kwargs=template_kwargs(chat.chat_template_kwargs, chat.reasoning_effort),
    )
    max_tokens, param = chat.max_tokens, "max_tokens"
    if chat.max_completion_tokens is not None:
        if max_tokens is not None and max_tokens != chat.max_completion_tokens:
            refuse("max_tokens", f"left out, or equal to max_completion_tokens, {chat.max_completion_tokens}", max_tokens)
        max_tokens, param = chat.max_completion_tokens, "max_completion_tokens"
    if chat.top_logprobs and chat.logprobs is not True:
        refuse("top_logprobs", "left out unless logprobs is true", chat.top_logprobs)
    check_logprobs("top_logprobs", chat.top_logprobs)
    logprobs = (chat.top_logprobs or 0) if chat.logprobs is True else None
    parsed = _finish(chat, prompt, max_tokens=max_tokens, max_tokens_param=param, logprobs=logprobs)
    return replace(parsed, generation=_with_tools_and_reasoning(parsed.generation, chat))


def _with_tools_and_reasoning(generation: GenerationRequest, chat: _Chat) -> GenerationRequest:
    check_reasoning_budget("reasoning_budget_tokens", chat.reasoning_budget_tokens)
    return replace(
        generation,
        tool_choice=tool_choice(chat.tool_choice),
        parallel_tool_calls=chat.parallel_tool_calls is not False,
        reasoning=ReasoningOptions(
            chat.separate_reasoning is not False, chat.stream_reasoning is not False, chat.reasoning_budget_tokens
        ),
    )


def parse_completion(body: bytes) -> ParsedRequest:
    """Read a body of POST /v1/completions.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    completion = _validate(_Completion, _drop_unused(load_object(body)))
    prompt, *others = _completion_prompts(completion.prompt, completion.add_special_tokens is not False)
    max_tokens = 16 if completion.max_tokens is None else completion.max_tokens
    check_logprobs("logprobs", completion.logprobs)
    echo = completion.echo is True
    # Nobody can be asked for no token: one is made and left out.
    drop_output = echo and max_tokens == 0
    parsed = _finish(
        completion, prompt, max_tokens=max_tokens or int(drop_output), max_tokens_param="max_tokens", logprobs=completion.logprobs
    )
    generation, num_best = parsed.generation, None
    if completion.best_of is not None and completion.best_of != generation.num_choices:
        num_best = generation.num_choices
        check_best_of(completion.best_of, num_best, is_streaming=parsed.is_streaming)
        generation = replace(
            generation, num_choices=completion.best_of, logprobs=0 if generation.logprobs is None else generation.logprobs
        )
    if echo and completion.logprobs is not None:
        if completion.prompt_logprobs not in (None, completion.logprobs):
            refuse("prompt_logprobs", f"left out, or logprobs, {completion.logprobs}, with echo", completion.prompt_logprobs)
        generation = replace(generation, prompt_logprobs=completion.logprobs)
    check_num_sequences(1 + len(others), generation.num_choices)
    return replace(
        parsed, generation=generation, other_prompts=tuple(others), num_best=num_best, echo=echo, drop_output=drop_output
    )


def parse_tokenize(body: bytes) -> TokenizeCall:
    """Read a body of POST /tokenize."""
    call = _validate(_Tokenize, load_object(body))
    if (call.prompt is None) == (call.messages is None):
        raise InvalidRequestError("exactly one of prompt and messages must be given", param="prompt")
    if call.messages is not None:
        prompt = conversation(
            call.messages,
            add_generation_prompt=call.add_generation_prompt,
            continue_final=call.continue_final_message,
            tools=call.tools,
            template_kwargs=template_kwargs(call.chat_template_kwargs, None),
        )
        return TokenizeCall(call.model or "", prompt)
    return TokenizeCall(call.model or "", TextPrompt(call.prompt or "", call.add_special_tokens is not False))


def parse_detokenize(body: bytes) -> DetokenizeCall:
    """Read a body of POST /detokenize."""
    call = _validate(_Detokenize, load_object(body))
    if call.tokens:
        check_token_ids("tokens", call.tokens)
    return DetokenizeCall(call.model or "", call.tokens, call.skip_special_tokens is not False)


def _drop_unused(body: dict[str, Any], table: Mapping[str, tuple[object, ...]] = _NOT_YET, path: str = "") -> dict[str, Any]:
    return drop_unused(body, table, ignored=frozenset() if path else IGNORED_FIELDS, path=path)


def _validate(shape: type[_Model], body: dict[str, Any]) -> _Model:
    return validate(shape, body, also_known=_NOT_YET, unions=_UNIONS)


def _completion_prompts(prompt: str | list[Any], add_special_tokens: bool) -> list[Prompt]:
    """One prompt, as text or as tokens, or an array of prompts of one kind."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        kind = type(prompt[0])
        if any(type(item) is not kind for item in prompt):
            refuse("prompt", "an array of strings or of arrays of token ids, not of both", prompt)
        return [_completion_prompt(item, add_special_tokens) for item in prompt]
    return [_completion_prompt(prompt, add_special_tokens)]


def _completion_prompt(prompt: str | list[Any], add_special_tokens: bool) -> Prompt:
    if isinstance(prompt, str):
        if not prompt:
            refuse("prompt", "a non-empty string", prompt)
        return TextPrompt(prompt, add_special_tokens)
    return TokenPrompt(check_token_ids("prompt", prompt))


def _logit_bias(biases: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """Biases by token id; JSON's keys are strings."""
    found = []
    for key, bias in (biases or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= _ID_DIGITS):
            refuse("logit_bias", "an object whose keys are token ids", key)
        found.append((int(key), bias))
    return tuple(found)


def _finish(body: _Shared, prompt: Prompt, *, max_tokens: int | None, max_tokens_param: str, logprobs: int | None) -> ParsedRequest:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    sampling = Sampling(
        body.temperature,
        body.top_p,
        body.top_k,
        body.min_p,
        body.seed,
        body.frequency_penalty,
        body.presence_penalty,
        body.repetition_penalty,
        _logit_bias(body.logit_bias),
    )
    check_logprobs("prompt_logprobs", body.prompt_logprobs)
    if body.prompt_logprobs is not None and body.stream is True:
        refuse(
            "prompt_logprobs",
            "left out when stream is true (a completion's echo with logprobs can be streamed)",
            body.prompt_logprobs,
        )
    stopping = Stopping(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        ignore_eos=body.ignore_eos is True,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop_in_output=body.include_stop_str_in_output is True,
    )
    check_sampling(sampling)
    check_stopping(stopping, max_tokens_param=max_tokens_param)
    check_priority(body.priority or 0)
    num_choices = 1 if body.n is None else body.n
    check_num_choices("n", num_choices)
    asked = body.speculative or _Speculative()
    speculative = Speculative(asked.method, asked.num_speculative_tokens)
    check_speculative(speculative)
    options = body.stream_options
    if options is not None and body.stream is not True:
        refuse("stream_options", "left out unless stream is true", options.model_dump())
    generation = GenerationRequest(
        body.model or "",
        prompt,
        sampling,
        stopping,
        body.skip_special_tokens is not False,
        body.priority or 0,
        check_cache_salt(body.cache_salt),
        num_choices=num_choices,
        speculative=speculative,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        constraint=constraint_of({name: getattr(body, name) for name in CONSTRAINT_FIELDS}),
    )
    return ParsedRequest(
        generation,
        body.user,
        is_streaming=body.stream is True,
        include_usage=options is not None and options.include_usage,
        has_running_usage=options is not None and options.continuous_usage_stats,
        keeps_logprobs=logprobs is not None,
        tells_prompt=body.prompt_logprobs is not None,
    )
