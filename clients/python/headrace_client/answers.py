"""Messages of the protos to what calls give back."""

from __future__ import annotations

from collections.abc import Iterable

from headrace_client.types import EmbeddingInfo, LikelyToken, Model, Piece, TokenLogprob, ToolCallDelta, Usage
from headrace_client.v1 import common_pb2 as common
from headrace_client.v1 import inference_pb2 as inference

_FINISH_REASONS: dict[int, str | None] = {
    common.FINISH_REASON_UNSPECIFIED: None,
    common.FINISH_REASON_STOP: "stop",
    common.FINISH_REASON_LENGTH: "length",
    common.FINISH_REASON_ABORT: "abort",
    common.FINISH_REASON_ERROR: "error",
}


def piece_of(message: inference.ChatResponse | inference.GenerateResponse) -> Piece:
    """A piece of an answer."""
    if isinstance(message, inference.ChatResponse):
        text, reasoning, calls = message.content, message.reasoning, tuple(message.tool_calls)
    else:
        text, reasoning, calls = message.text, "", ()
    return Piece(
        text=text,
        token_ids=tuple(message.token_ids),
        choice=message.choice,
        # A reason that this version does not know is told by its number.
        finish_reason=_FINISH_REASONS.get(message.finish_reason, str(message.finish_reason)),
        usage=_usage_of(message.usage) if message.HasField("usage") else None,
        reasoning=reasoning,
        tool_calls=tuple(ToolCallDelta(call.index, call.id, call.name, call.arguments) for call in calls),
        logprobs=_logprobs_of(message.logprobs),
        prompt_logprobs=_logprobs_of(message.prompt_logprobs),
    )


def models_of(message: inference.ListModelsResponse) -> list[Model]:
    """The models that can be asked for."""
    return [
        Model(one.name, one.max_model_len, one.loaded_unix_s, _embedding_of(one.embedding) if one.HasField("embedding") else None)
        for one in message.models
    ]


def _usage_of(usage: inference.Usage) -> Usage:
    return Usage(usage.num_prompt_tokens, usage.num_output_tokens, usage.num_cached_tokens, usage.num_reasoning_tokens)


def _logprobs_of(tokens: Iterable[inference.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            one.token_id,
            one.text,
            one.logprob if one.HasField("logprob") else None,
            tuple(LikelyToken(likely.token_id, likely.text, likely.logprob) for likely in one.top),
        )
        for one in tokens
    )


def _embedding_of(info: common.EmbeddingInfo) -> EmbeddingInfo:
    return EmbeddingInfo(info.size, info.is_matryoshka, tuple(info.dimensions))
