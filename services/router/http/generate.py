"""Shapes of POST /generate, which are SGLang's, checked at the edge. Pure; answers are rendered in `generate_answers.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from headrace.errors import InvalidRequestError
from services.router.generation import Constraint, GenerationRequest, Prompt, Sampling, Stopping, TextPrompt, TokenPrompt
from services.router.http.validation import Body, drop_unused, load_object, renamed_fields, validate
from services.router.limits import (
    check_logprobs,
    check_num_choices,
    check_num_sequences,
    check_priority,
    check_sampling,
    check_stopping,
    check_token_ids,
    refuse,
)

IGNORED_FIELDS = frozenset({"log_metrics", "custom_labels", "background", "no_logs"})
"""Accepted and without effect here: they steer SGLang's own logs and metrics."""
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "input_embeds": (None,),
    "image_data": (None, []),
    "audio_data": (None, []),
    "video_data": (None, []),
    "modalities": (None, [], ["text"]),
    "token_ids_logprob": (None, []),
    "return_hidden_states": (None, False),
    "return_routed_experts": (None, False),
    "lora_path": (None,),
    "session_params": (None,),
    "custom_logit_processor": (None,),
    "require_reasoning": (None, False),
}
_SAMPLING_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "stop_regex": (None, "", []),
    "custom_params": (None, {}),
    "spaces_between_special_tokens": (None, True),
    "stream_interval": (None, 1),
}
_UNIONS = {
    "text": "a string or an array of strings",
    "input_ids": "an array of token ids, or an array of such arrays",
    "stop": "a string or an array of strings",
    "sampling_params": "an object or an array of objects, one for each prompt",
}
DEFAULT_MAX_NEW_TOKENS = 128
_Value = TypeVar("_Value")


class SamplingParams(Body):
    """How one prompt is continued; SGLang's defaults, not the model's."""

    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    n: int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None


class GenerateBody(Body):
    """Body of POST /generate."""

    model: str | None = Field(None, description="Ours, not SGLang's; left out: the model that is served.")
    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None
    rid: str | list[str] | None = Field(None, description="Told back as `meta_info.id`.")
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = Field(None, description="First prompt token with a logprob; -1: none of them.")
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt, and how its answer is to be told."""

    generation: GenerationRequest
    stops: tuple[str, ...]
    keeps_stop: bool
    rid: str
    logprob_start: int


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A call of /generate."""

    prompts: tuple[Asked, ...]
    is_batch: bool
    is_streaming: bool
    tells_text: bool

    @property
    def num_choices(self) -> int:
        """Choices of each prompt."""
        return self.prompts[0].generation.num_choices


def parse_generate(body: bytes) -> GenerateCall:
    """Read a body of POST /generate.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    value = drop_unused(load_object(body), _NOT_SERVED, ignored=IGNORED_FIELDS)
    value["sampling_params"] = _drop_sampling(value.get("sampling_params"))
    asked = validate(GenerateBody, value, unions=_UNIONS)
    prompts, is_batch = _prompts(asked)
    params = _each("sampling_params", asked.sampling_params or SamplingParams(), len(prompts))
    if len({each.n for each in params}) > 1:
        raise InvalidRequestError("sampling_params.n must be the same for all prompts", param="sampling_params.n")
    check_num_choices("sampling_params.n", params[0].n)
    check_num_sequences(len(prompts), params[0].n)
    check_priority(asked.priority or 0)
    logprobs = _each("return_logprob", asked.return_logprob or False, len(prompts))
    starts = _each("logprob_start_len", -1 if asked.logprob_start_len is None else asked.logprob_start_len, len(prompts))
    tops = _each("top_logprobs_num", asked.top_logprobs_num or 0, len(prompts))
    rids = _each("rid", asked.rid or "", len(prompts))
    made = tuple(
        _asked(asked, prompt, params[index], rids[index], tops[index] if logprobs[index] else None, starts[index])
        for index, prompt in enumerate(prompts)
    )
    return GenerateCall(made, is_batch, asked.stream, asked.return_text_in_logprobs)


def _drop_sampling(params: object) -> object:
    if isinstance(params, list):
        return [_drop_sampling(each) for each in params]
    return drop_unused(params, _SAMPLING_NOT_SERVED, path="sampling_params.") if isinstance(params, dict) else params


def _prompts(asked: GenerateBody) -> tuple[list[Prompt], bool]:
    if (asked.text is None) == (asked.input_ids is None):
        raise InvalidRequestError("exactly one of text and input_ids must be given", param="text")
    if asked.text is not None:
        texts = asked.text if isinstance(asked.text, list) else [asked.text]
        if not texts or not all(texts):
            refuse("text", "a non-empty string or array of such", asked.text)
        return [TextPrompt(text) for text in texts], isinstance(asked.text, list)
    ids = asked.input_ids or []
    if not ids:
        refuse("input_ids", "non-empty", ids)
    is_batch = isinstance(ids[0], list)
    rows: Sequence[Any] = ids if is_batch else [ids]
    return [TokenPrompt(check_token_ids("input_ids", row)) for row in rows], is_batch


def _each(param: str, value: _Value | list[_Value], count: int) -> list[_Value]:
    """A value for each prompt, of one for all or of a list."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        refuse(param, f"one value, or one for each of the {count} prompts", f"{len(value)} of them")
    return value


def _asked(body: GenerateBody, prompt: Prompt, params: SamplingParams, rid: str, num_top: int | None, start: int) -> Asked:
    stops = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
    sampling = Sampling(
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.sampling_seed,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=_biases(params.logit_bias),
    )
    # The stop string stays in the output so that the answer can say which one it was.
    stopping = Stopping(
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        ignore_eos=params.ignore_eos,
        stop=stops,
        stop_token_ids=tuple(params.stop_token_ids or ()),
        include_stop_in_output=bool(stops),
    )
    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
    with renamed_fields({name: f"sampling_params.{names.get(name, name)}" for name in _CHECKED}):
        check_sampling(sampling)
        check_stopping(stopping)
    check_logprobs("top_logprobs_num", num_top)
    if start < -1:
        refuse("logprob_start_len", "-1 or more", start)
    generation = GenerationRequest(
        body.model or "",
        prompt,
        sampling,
        stopping,
        params.skip_special_tokens,
        body.priority or 0,
        num_choices=params.n,
        constraint=_constraint(params),
        logprobs=num_top,
        prompt_logprobs=num_top if start >= 0 else None,
    )
    return Asked(generation, stops, params.no_stop_trim, rid, start)


_CHECKED = (
    "max_tokens", "min_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "seed",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias",
)  # fmt: skip


def _biases(biases: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    for name in biases or ():
        if not name.isascii() or not name.isdigit() or len(name) > 10:
            refuse("sampling_params.logit_bias", "an object whose keys are token ids", name)
    return tuple((int(name), bias) for name, bias in (biases or {}).items())


def _constraint(params: SamplingParams) -> Constraint | None:
    given = [name for name in ("json_schema", "regex", "ebnf", "structural_tag") if getattr(params, name) is not None]
    if len(given) > 1:
        param = f"sampling_params.{given[1]}"
        raise InvalidRequestError(
            f"at most one of json_schema, regex, ebnf and structural_tag; got {' and '.join(given)}", param=param
        )
    if not given:
        return None
    return Constraint(given[0], getattr(params, given[0]), param=f"sampling_params.{given[0]}")
