"""Ollama's request shapes, checked at the edge and turned into our own. Pure; answers are rendered in `ollama_answers.py`."""

from __future__ import annotations

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
    Prompt,
    Sampling,
    Stopping,
    TextPrompt,
    Tool,
    ToolCall,
)
from services.router.http.structured import schema_source
from services.router.http.validation import Body, drop_unused, load_object, renamed_fields, validate
from services.router.limits import MAX_LOGPROBS, MAX_MESSAGES, check_sampling, check_stopping, refuse

IGNORED_FIELDS = frozenset({"keep_alive", "truncate", "shift", "context", "width", "height", "steps"})
"""Accepted and without effect here: they steer how Ollama loads models and cuts prompts."""
IGNORED_OPTIONS = frozenset(
    {
        "numa", "num_ctx", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap",
        "use_mlock", "embedding_only", "num_thread", "num_keep", "penalize_newline", "repeat_last_n", "mirostat_tau",
        "mirostat_eta",
    }
)  # fmt: skip
"""The same among `options`: they steer how Ollama loads a model."""
_NOT_SERVED: dict[str, tuple[object, ...]] = {"suffix": (None, ""), "template": (None, ""), "images": (None, [])}
_OPTIONS_NOT_SERVED: dict[str, tuple[object, ...]] = {"tfs_z": (None, 1), "typical_p": (None, 1), "mirostat": (None, 0)}
_UNIONS = {
    "format": '"", "json" or a JSON schema',
    "think": "true, false, low, medium or high",
    "stop": "a string or an array of strings",
}
MAX_TOOLS = 128
_LATEST = ":latest"


class Options(Body):
    """How tokens are drawn, and when it ends."""

    num_predict: int | None = Field(default=None, description="Most output tokens; -1 and -2: as many as fit.")
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = Field(default=None, description="0: no limit.")
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None


class _Asked(Body):
    model: str = Field(min_length=1)
    stream: bool | None = Field(None, description="True where it is left out.")
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class CalledFunction(Body):
    """What a call of an earlier answer called."""

    name: str = Field(min_length=1, max_length=128)
    arguments: dict[str, Any]
    index: int | None = Field(None, description="Ignored.")
    description: str | None = Field(None, description="Ignored.")


class CallShape(Body):
    """A tool call of an earlier answer."""

    function: CalledFunction
    type: Literal["function"] | None = None
    id: str | None = None


class Message(Body):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = Field(None, max_length=0, description="Not served: null or empty.")
    tool_calls: list[CallShape] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class FunctionShape(Body):
    """A function of the client's."""

    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolShape(Body):
    """A tool of the client's."""

    type: Literal["function"] | None = None
    function: FunctionShape


class ChatBody(_Asked):
    """Body of POST /api/chat."""

    messages: list[Message] | None = Field(None, max_length=MAX_MESSAGES)
    tools: list[ToolShape] | None = Field(None, max_length=MAX_TOOLS)


class GenerateBody(_Asked):
    """Body of POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class ShowBody(Body):
    """Body of POST /api/show."""

    model: str | None = None
    name: Annotated[str | None, Field(description="An older name of `model`.")] = None
    verbose: bool | None = Field(None, description="Ignored.")


@dataclass(frozen=True, slots=True)
class OllamaCall:
    """A call of /api/chat or /api/generate. Without a generation it only asks that the model be loaded."""

    model: str
    generation: GenerationRequest | None
    is_streaming: bool


def parse_chat(body: bytes) -> OllamaCall:
    """Read a body of POST /api/chat.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    asked = validate(ChatBody, _drop(load_object(body)), unions=_UNIONS)
    if not asked.messages:
        return OllamaCall(model_name(asked.model), None, asked.stream is not False)
    turns = _turns(asked.messages)
    names = [tool.function.name for tool in asked.tools or ()]
    for index, name in enumerate(names):
        if name in names[:index]:
            refuse(f"tools.{index}.function.name", "different from the names of the other tools", name)
    tools = tuple(Tool(each.function.name, each.function.description or "", each.function.parameters) for each in asked.tools or ())
    is_continued = turns[-1].role == "assistant"
    prompt = ConversationPrompt(
        turns,
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
        tools=tools,
        template_kwargs=_template_kwargs(asked.think),
    )
    return _call(asked, prompt)


def parse_generate(body: bytes) -> OllamaCall:
    """Read a body of POST /api/generate.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    asked = validate(GenerateBody, _drop(load_object(body)), unions=_UNIONS)
    if not asked.prompt:
        return OllamaCall(model_name(asked.model), None, asked.stream is not False)
    if asked.raw is True:
        if asked.system:
            refuse("system", "left out where raw is true", asked.system)
        return _call(asked, TextPrompt(asked.prompt))
    system = [ChatTurn("system", asked.system)] if asked.system else []
    turns = (*system, ChatTurn("user", asked.prompt))
    return _call(asked, ConversationPrompt(turns, template_kwargs=_template_kwargs(asked.think)))


def parse_show(body: bytes) -> str:
    """Read a body of POST /api/show: the model's name."""
    asked = validate(ShowBody, load_object(body))
    name = asked.model or asked.name
    if not name:
        raise InvalidRequestError("model is required", param="model")
    return model_name(name)


def model_name(name: str) -> str:
    """A model's name without the tag that Ollama's clients add."""
    return name.removesuffix(_LATEST)


def _drop(body: dict[str, Any]) -> dict[str, Any]:
    kept = drop_unused(body, _NOT_SERVED, ignored=IGNORED_FIELDS)
    if isinstance(kept.get("options"), dict):
        kept["options"] = drop_unused(kept["options"], _OPTIONS_NOT_SERVED, ignored=IGNORED_OPTIONS, path="options.")
    return kept


def _turns(messages: list[Message]) -> tuple[ChatTurn, ...]:
    turns = []
    calls: dict[str, str] = {}
    for index, message in enumerate(messages):
        made = []
        for number, call in enumerate(message.tool_calls or ()):
            call_id = call.id or f"call_{index}_{number}"
            made.append(ToolCall(call_id, call.function.name, orjson.dumps(call.function.arguments).decode()))
            calls[call.function.name] = call_id
        if made and message.role != "assistant":
            refuse(f"messages.{index}.tool_calls", "left out but in a turn of the assistant", f"a turn of the {message.role}")
        name = message.tool_name or ""
        call_id = message.tool_call_id or calls.get(name, "") if message.role == "tool" else ""
        turns.append(
            ChatTurn(
                message.role,
                message.content or "",
                name=name,
                tool_calls=tuple(made),
                tool_call_id=call_id,
                reasoning=message.thinking or "",
            )
        )
    return tuple(turns)


def _template_kwargs(think: bool | str | None) -> dict[str, Any]:
    if think is None:
        return {}
    found: dict[str, Any] = {"enable_thinking": think is not False}
    if isinstance(think, str):
        found["reasoning_effort"] = think
    return found


def _call(asked: _Asked, prompt: Prompt) -> OllamaCall:
    options = asked.options or Options()
    stops = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
    sampling = Sampling(
        options.temperature,
        options.top_p,
        -1 if options.top_k == 0 else options.top_k,
        options.min_p,
        options.seed,
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        repetition_penalty=options.repeat_penalty,
    )
    stopping = Stopping(max_tokens=None if options.num_predict in (-1, -2) else options.num_predict, stop=stops)
    with renamed_fields({name: f"options.{_OPTION_NAMES.get(name, name)}" for name in _CHECKED}):
        check_sampling(sampling)
        check_stopping(stopping)
    if asked.top_logprobs and asked.logprobs is not True:
        refuse("top_logprobs", "0 unless logprobs is true", asked.top_logprobs)
    name = model_name(asked.model)
    generation = GenerationRequest(
        name,
        prompt,
        sampling,
        stopping,
        constraint=_constraint(asked.format),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
    return OllamaCall(name, generation, asked.stream is not False)


_OPTION_NAMES = {"max_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}
_CHECKED = (
    "max_tokens", "stop", "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
    "repetition_penalty",
)  # fmt: skip


def _constraint(form: str | dict[str, Any] | None) -> Constraint | None:
    if not form:
        return None
    if isinstance(form, str):
        return Constraint("json_object", param="format")
    return Constraint("json_schema", schema_source(form), param="format")
