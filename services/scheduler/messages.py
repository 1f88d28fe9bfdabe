"""Between the wire's messages and the core's types. Pure; whatever a peer may have got wrong is found here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

import numpy as np

from headrace.errors import HeadraceError, InvalidRequestError, OverloadedError, ProtocolError, UnavailableError
from headrace.priorities import PRIORITY_MAX, PRIORITY_MIN
from headrace.telemetry.traces import Context
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import router_pb2 as router
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import worker_pb2 as worker
from headrace.wire.envelope import int32_array
from services.scheduler import logprob_messages
from services.scheduler.cache_feed import CacheNews
from services.scheduler.lane import LaneCapacity
from services.scheduler.outbox import Target
from services.scheduler.sequence import Sequence, StoppingRules
from services.scheduler.step_plan import StepPlan, StepResult
from services.scheduler.token_fanout import StreamBatch

POOL_NAME = "full"
"""The page pool that is planned for; a model with several kinds of attention has more."""

_TOKEN_BYTES = 4
_ROW_ERRORS = {
    scheduler.ROW_ERROR_NON_FINITE_LOGITS: "its logits held NaN or infinity",
    scheduler.ROW_ERROR_CONSTRAINT: "its constraint cannot be followed further: it became too complex, or allows nothing",
}


def lane_capacity(capacity: control.Capacity | None) -> LaneCapacity:
    """What a worker group offers.

    Raises:
        ProtocolError: It does not say, offers no text generation, or has a size of zero.
    """
    if capacity is None:
        raise ProtocolError("a worker registered without its capacity")
    if control.WORK_KIND_GENERATE not in capacity.work_kinds:
        raise ProtocolError(f"a worker for {capacity.model.name!r} does not generate: work_kinds is {list(capacity.work_kinds)}")
    pool = next((pool for pool in capacity.pools if pool.name == POOL_NAME), None)
    if pool is None:
        raise ProtocolError(f"a worker has no page pool {POOL_NAME!r}, only {[pool.name for pool in capacity.pools]}")
    try:
        return LaneCapacity(
            model=capacity.model.name,
            max_model_len=capacity.model.max_model_len,
            vocab_size=capacity.vocab_size,
            num_pages=pool.num_pages,
            page_size=pool.page_size,
            max_num_seqs=capacity.max_num_seqs,
            max_num_batched_tokens=capacity.max_num_batched_tokens,
            pool_name=pool.name,
            group=capacity.lane_group,
            copies_pages=capacity.copies_pages,
            max_num_drafts=capacity.max_num_drafts,
        )
    except ValueError as error:
        raise ProtocolError(str(error)) from error


def check_submit(submit: scheduler.Submit, frames: Items[memoryview], *, vocab_size: int) -> array[int]:
    """The tokens of a Submit, after a look at everything else in it.

    Raises:
        ProtocolError: The frame or a count is wrong, or the detokenizer is missing.
        InvalidRequestError: A token id is outside the vocabulary.
    """
    tokens = int32_array(frames[0] if frames else None, count=submit.num_tokens)
    if submit.num_output_tokens and submit.num_output_tokens >= submit.num_tokens:
        raise ProtocolError(f"submit: num_output_tokens is {submit.num_output_tokens} of {submit.num_tokens} tokens")
    if not submit.detokenizer.address or not submit.detokenizer.incarnation:
        raise ProtocolError("submit: no detokenizer is named")
    if len(tokens) and vocab_size:
        outside = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        if not 0 <= outside < vocab_size:
            raise InvalidRequestError(f"token id {outside} is outside the vocabulary of {vocab_size} tokens", param="prompt")
    biased = max((entry.token_id for entry in submit.sampling.logit_bias), default=0)
    if vocab_size and biased >= vocab_size:
        raise InvalidRequestError(
            f"logit_bias names token id {biased}, which is outside the vocabulary of {vocab_size} tokens", param="logit_bias"
        )
    return array("i", tokens.astype(np.int32).tobytes())


def check_priority(submit: scheduler.Submit, *, is_ordered: bool) -> None:
    """Refuse a priority that is out of range, or would change nothing.

    Raises:
        InvalidRequestError: It names the range, or the settings.
    """
    if not PRIORITY_MIN <= submit.priority <= PRIORITY_MAX:
        raise InvalidRequestError(
            f"priority must be between {PRIORITY_MIN} and {PRIORITY_MAX}, got {submit.priority}", param="priority"
        )
    if submit.priority and not is_ordered:
        raise InvalidRequestError(
            f"priority is {submit.priority} and this scheduler does not go by priority: leave it out, or set scheduler.policy or "
            "scheduler.prefix_cache to priority",
            param="priority",
        )


def sequence(
    submit: scheduler.Submit, tokens: array[int], *, owner: int, target: Target, now_ns: int, now_unix_ns: int
) -> Sequence:
    """The sequence a Submit asks for. Its deadline moves to the monotonic clock: a jump of the wall clock changes nothing then."""
    stopping = submit.stopping
    stop_token_ids = set(stopping.stop_token_ids)
    if not stopping.ignore_eos:
        stop_token_ids.update(submit.eos_token_ids)
    deadline_unix_ns = submit.work.deadline_unix_ns
    logprobs, prompt_logprobs = logprob_messages.asked_of(submit)
    return Sequence(
        request_id=submit.work.request_id,
        stream_id=submit.stream_id,
        owner=owner,
        model=submit.model,
        tokens=tokens,
        num_prompt_tokens=len(tokens) - submit.num_output_tokens,
        stopping=StoppingRules(
            stop_token_ids=frozenset(stop_token_ids),
            min_tokens=stopping.min_tokens,
            max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        ),
        target=target,
        sampling=submit.sampling,
        speculative=submit.speculative if submit.HasField("speculative") else None,
        wants_drafts=submit.HasField("speculative") and submit.speculative.method != common.SPECULATIVE_METHOD_OFF,
        num_drafts_asked=_num_drafts_asked(submit),
        constraint=submit.constraint if submit.HasField("constraint") else None,
        tenant=submit.tenant,
        priority=submit.priority,
        namespace=submit.cache_namespace,
        # Who tells of its prompt computes it.
        fork_group=submit.fork_group if prompt_logprobs is None else "",
        # Zero would mean none.
        deadline_ns=max(1, now_ns + deadline_unix_ns - now_unix_ns) if deadline_unix_ns else 0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _num_drafts_asked(submit: scheduler.Submit) -> int | None:
    speculative = submit.speculative
    # What a draft may be depends on the drafts before it: the worker's matchers do not go there.
    if submit.HasField("constraint") or speculative.method == common.SPECULATIVE_METHOD_OFF:
        return 0
    # Penalties count the tokens one after another, and logprobs are told of one token a row: no worker drafts there.
    sampling = submit.sampling
    repeats = sampling.HasField("repetition_penalty") and sampling.repetition_penalty != 1.0
    if submit.HasField("logprobs") or repeats or sampling.frequency_penalty or sampling.presence_penalty:
        return 0
    return speculative.num_speculative_tokens if speculative.HasField("num_speculative_tokens") else None


def step_plan(plan: StepPlan, works: Items[common.WorkHeader]) -> tuple[worker.StepPlan, list[bytes]]:
    """A plan's message and frames; `works` are the headers of its new sequences."""
    body = worker.StepPlan(
        step_id=plan.step_id,
        freed_slots=plan.freed_slots,
        page_slots=plan.page_slots,
        num_new_pages=plan.num_new_pages,
        new_pages=plan.new_pages,
        row_slots=plan.row_slots,
        row_num_new_tokens=plan.row_num_new_tokens,
        same_rows=plan.same_rows,
        copied_pages=plan.copied_pages,
        page_copies=plan.page_copies,
    )
    if not plan.new_sequences:
        return body, []
    for new, work in zip(plan.new_sequences, works, strict=True):
        assert isinstance(new.sampling, common.SamplingParams)
        entry = body.new_sequences.add(slot=new.slot, work=work, num_tokens=new.num_tokens, num_cached_tokens=new.num_reused_tokens)
        entry.sampling.CopyFrom(new.sampling)
        entry.num_output_tokens = new.num_output_tokens
        if new.logprobs is not None:
            entry.logprobs = new.logprobs.num_top
        if new.prompt_logprobs is not None and new.wants_prompt_logprobs:
            entry.prompt_logprobs = new.prompt_logprobs.num_top
        if new.num_output_tokens < new.stopping.min_tokens:
            entry.min_output_tokens = new.stopping.min_tokens
            entry.stop_token_ids.extend(sorted(new.stopping.stop_token_ids))
        if isinstance(new.constraint, common.Constraint):
            entry.constrained.constraint.CopyFrom(new.constraint)
            entry.constrained.num_output_tokens = new.num_output_tokens
        if new.max_num_drafts:
            entry.max_num_drafts, entry.max_num_tokens = new.max_num_drafts, new.max_num_tokens
            entry.num_foretold_tokens = len(new.foretold)
            if isinstance(new.speculative, common.SpeculativeParams):
                entry.speculative.CopyFrom(new.speculative)
    return body, [b"".join(new.tokens.tobytes() + new.foretold.tobytes() for new in plan.new_sequences)]


def work_header(held: Sequence, context: Context, *, now_ns: int, now_unix_ns: int) -> common.WorkHeader:
    """The header with which a sequence goes to a worker."""
    return common.WorkHeader(
        request_id=held.request_id,
        traceparent=context.traceparent,
        tracestate=context.tracestate,
        deadline_unix_ns=held.deadline_ns - now_ns + now_unix_ns if held.deadline_ns else 0,
        enqueued_unix_ns=now_unix_ns,
    )


def step_result(body: scheduler.StepResult) -> StepResult:
    """A step's result."""
    result = StepResult(
        step_id=body.step_id,
        slots=list(body.slots),
        token_ids=list(body.token_ids),
        num_tokens=list(body.num_tokens),
        ended_slots=list(body.ended_slots),
        duration_ns=max(0, body.finished_unix_ns - body.started_unix_ns),
        num_drafts=sum(body.num_drafts),
        logprobs=logprob_messages.logs_by_row(body.logprobs) if body.HasField("logprobs") else {},
        prompt_logprobs=logprob_messages.logs_by_row(body.prompt_logprobs) if body.HasField("prompt_logprobs") else {},
    )
    for index, slot in enumerate(body.failed_slots):
        reason = body.failed_reasons[index] if index < len(body.failed_reasons) else scheduler.ROW_ERROR_UNSPECIFIED
        if reason == scheduler.ROW_ERROR_UNKNOWN_SLOT:
            result.unknown_slots.append(slot)
        else:
            result.failed_slots.append(slot)
            result.failed_reasons.append(_ROW_ERRORS.get(reason, f"the worker's reason is number {reason}"))
    return result


def cache_events(news: CacheNews) -> tuple[router.CacheEvents, list[bytes]]:
    """The message of a lane's cache events, with a frame of tokens for those who want them."""
    body = router.CacheEvents(
        lane=news.lane_id, page_size=news.page_size, first_number=news.first_number, is_snapshot=news.is_snapshot
    )
    for event in news.events:
        # Numbers of the same enum; the stubs want the generated type.
        body.kinds.append(int(event.kind))  # type: ignore[arg-type]
        body.num_hashes.append(len(event.hashes))
        body.hashes.extend(event.hashes)
    if not news.with_tokens:
        return body, []
    body.parents.extend(event.before for event in news.events)
    tokens = b"".join(event.tokens for event in news.events)
    body.num_tokens = len(tokens) // _TOKEN_BYTES
    return body, [tokens]


def token_batch(batch: StreamBatch, *, enqueued_unix_ns: int) -> detokenizer.TokenBatch:
    """A batch's message."""
    body = detokenizer.TokenBatch(
        stream_ids=batch.stream_ids,
        first_positions=batch.first_positions,
        num_tokens=batch.num_tokens,
        token_ids=batch.token_ids,
        # Numbers of the same enum; the stubs want the generated type.
        finish_reasons=batch.finish_reasons,  # type: ignore[arg-type]
        num_stop_tokens=batch.num_stop_tokens,
        enqueued_unix_ns=enqueued_unix_ns,
        num_cached_tokens=batch.num_cached_tokens,
    )
    if batch.has_logprobs:
        logprob_messages.fill(body, batch)
    return body


def error_detail(error: HeadraceError) -> common.ErrorDetail:
    """An error's message."""
    detail = common.ErrorDetail(code=error.code, message=error.message, param=error.param or "")
    if isinstance(error, (OverloadedError, UnavailableError)):
        detail.retry_after_s = error.retry_after_s
    return detail
