"""Fields of requests, as types: what the `**fields` of calls may be. A test holds them to the protos, which say what each means.

A field that is None is as good as absent. A message inside a message is a dict of its fields, or the generated message itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Required, TypedDict

from headrace_client.v1 import common_pb2 as common
from headrace_client.v1 import inference_pb2 as inference

JsonObject = Mapping[str, object]
"""Sent as JSON."""


class LogitBias(TypedDict):
    """What is added to the logit of one token."""

    token_id: int
    bias: float


class Constraint(TypedDict, total=False):
    """What a whole output must be. A source of JSON (a schema, choices, a structural tag) may be given as dict or list."""

    kind: Required[Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag"]]
    source: str | JsonObject | Sequence[str] | None


class SpeculativeParams(TypedDict, total=False):
    """How the output may be speculated on."""

    method: Literal["off", "ngram", "auto"] | None
    num_speculative_tokens: int | None


class ReasoningParams(TypedDict, total=False):
    """What becomes of the model's reasoning."""

    separate: bool | None
    stream: bool | None
    budget_tokens: int | None


class SamplingFields(TypedDict, total=False):
    """How tokens are drawn: those of `SamplingParams`."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Sequence[LogitBias | common.LogitBias] | None


class StoppingFields(TypedDict, total=False):
    """When to stop: those of `StoppingParams`."""

    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    stop_token_ids: Sequence[int] | None
    stop: str | Sequence[str] | None
    include_stop_in_output: bool | None


class GenerateFields(SamplingFields, StoppingFields, total=False):
    """Those of `GenerateRequest`, of its sampling and of its stopping."""

    model: str | None
    skip_special_tokens: bool | None
    priority: int | None
    cache_salt: str | None
    num_choices: int | None
    speculative: SpeculativeParams | common.SpeculativeParams | None
    constraint: Constraint | common.Constraint | None
    logprobs: int | None
    prompt_logprobs: int | None


class PromptFields(TypedDict, total=False):
    """How a conversation is written for the model: those of `ChatPrompt`. JSON may be given as list or dict."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    tools: str | Sequence[JsonObject] | None
    template_kwargs: str | JsonObject | None


class ChatFields(GenerateFields, PromptFields, total=False):
    """Those of `ChatRequest`, of its prompt, its sampling and its stopping."""

    tool_choice: str | None
    parallel_tool_calls: bool | None
    reasoning: ReasoningParams | inference.ReasoningParams | None


class TokenizeFields(PromptFields, total=False):
    """Those of `TokenizeRequest`; of a conversation also those of its prompt."""

    model: str | None
    add_special_tokens: bool | None
