"""Logprobs between the wire's flat arrays and sequences. Pure."""

from __future__ import annotations

from array import array

from headrace.v1 import common_pb2 as common
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import scheduler_pb2 as scheduler
from services.scheduler.logprobs import TokenLogs, split
from services.scheduler.token_fanout import StreamBatch


def logs_by_row(body: common.TokenLogprobs) -> dict[int, TokenLogs]:
    """Logprobs by row; none at all where the arrays do not fit each other: those who asked then miss theirs."""
    num_tokens, num_top = list(body.num_tokens), list(body.num_top)
    num_likely = sum(count * most for count, most in zip(num_tokens, num_top, strict=False))
    if (
        not len(body.rows) == len(num_tokens) == len(num_top)
        or sum(num_tokens) != len(body.logprobs)
        or not num_likely == len(body.top_token_ids) == len(body.top_logprobs)
    ):
        return {}
    logs = split(num_tokens, num_top, array("f", body.logprobs), array("I", body.top_token_ids), array("f", body.top_logprobs))
    return dict(zip(body.rows, logs, strict=True))


def asked_of(submit: scheduler.Submit) -> tuple[TokenLogs | None, TokenLogs | None]:
    """What a Submit wants told of outputs and of the prompt; empty yet, but for outputs of a former life: those are lost."""
    outputs = TokenLogs(submit.logprobs) if submit.HasField("logprobs") else None
    if outputs is not None:
        outputs.skip(submit.num_output_tokens)
    return outputs, TokenLogs(submit.prompt_logprobs) if submit.HasField("prompt_logprobs") else None


def fill(body: detokenizer.TokenBatch, batch: StreamBatch) -> None:
    """Add the logprobs of a batch's tokens to its message, and those of prompts whose first output is among them."""
    counts = batch.num_tokens or [1] * len(batch.sequences)
    for place, (sequence, first, count) in enumerate(zip(batch.sequences, batch.first_positions, counts, strict=True)):
        if not count:
            continue
        if sequence.logprobs is not None:
            _add(body.logprobs, place, sequence.logprobs.part(first, first + count))
        if sequence.prompt_logprobs is not None and first == 0:
            told = TokenLogs(sequence.prompt_logprobs.num_top)
            # Nothing comes before the first token.
            told.skip(1)
            told.append(sequence.prompt_logprobs)
            _add(body.prompt_logprobs, place, told)
            body.prompt_token_ids.extend(sequence.tokens[: sequence.num_prompt_tokens])


def _add(body: common.TokenLogprobs, place: int, told: TokenLogs) -> None:
    body.rows.append(place)
    body.num_tokens.append(len(told))
    body.num_top.append(told.num_top)
    body.logprobs.extend(told.logprobs)
    body.top_token_ids.extend(told.top_token_ids)
    body.top_logprobs.extend(told.top_logprobs)
