"""Applies a step's result to its lane: appends tokens, finds the sequences that ended, makes the batches for the detokenizers.

A result is input from another process: unknown slots, missing rows and impossible tokens end the requests they concern, nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.errors import HeadraceError, RequestFailedError
from services.scheduler.lane import Lane
from services.scheduler.sequence import FinishReason, Sequence
from services.scheduler.step_plan import StepInFlight, StepResult
from services.scheduler.token_fanout import StreamBatch


@dataclass(slots=True)
class StepOutcome:
    """What a result meant.

    Attributes:
        batches: Tokens, one batch a detokenizer.
        finished: Sequences that ended with a stop or a length; their reason is set. They still hold their slot and pages.
        failed: Sequences that ended with an error. They still hold theirs, too.
        lost: Sequences the worker does not hold and which may be tried again. They still hold their slot and pages here.
        num_ignored_rows: Rows for slots the plan did not have.
        num_tokens: Tokens that the step computed.
    """

    batches: list[StreamBatch] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, HeadraceError]] = field(default_factory=list)
    lost: list[Sequence] = field(default_factory=list)
    num_ignored_rows: int = 0
    num_tokens: int = 0


# A worker that has lost its link for a moment forgets everything, unseen by us; but one that refuses a sequence says the same.
LOST_MAX = 1


def apply_result(lane: Lane, result: StepResult) -> StepOutcome | None:
    """Apply a result.

    Returns:
        What it meant, or None when the lane does not wait for this step now.
    """
    if next(iter(lane.in_flight), None) != result.step_id:
        return None
    step = lane.in_flight.pop(result.step_id)
    lane.clock.num_done = step.tick
    outcome = StepOutcome(num_tokens=step.num_tokens)
    is_complete = (
        not result.failed_slots
        and not result.unknown_slots
        and not result.num_tokens
        and len(result.token_ids) == len(step.sampled.slots)
        and result.slots == step.sampled.slots
        and max(result.token_ids, default=0) < lane.capacity.vocab_size
    )
    if not is_complete:
        rows, token_ids = _sort_out(lane, step, result, outcome)
    elif step.version == lane.version:
        rows, token_ids = step.sampled.sequences, result.token_ids
    else:
        rows, token_ids = _still_here(lane, step, result.token_ids)
    for sequence, _slot, admission, num_scheduled in step.extended:
        if sequence.lane is lane and sequence.admission == admission:
            sequence.num_computed = num_scheduled
    if step.completed:
        got_token = set(rows)
        for sequence in step.completed:
            if sequence in got_token:
                lane.kv.publish(sequence)
    if rows:
        for sequence, token_id in zip(rows, token_ids, strict=True):
            sequence.tokens.append(token_id)
        lane.num_tokens += len(rows)
        outcome.batches = lane.fanout.split(rows, token_ids, version=lane.version)
    _find_finished(lane, step, rows, token_ids, outcome)
    if outcome.finished:
        for batch in outcome.batches:
            batch.mark_finished()
    return outcome


def _find_finished(lane: Lane, step: StepInFlight, rows: list[Sequence], token_ids: list[int], outcome: StepOutcome) -> None:
    if not lane.stop_token_ids.keys().isdisjoint(token_ids):
        for sequence, token_id in zip(rows, token_ids, strict=True):
            if sequence.is_stop(token_id):
                sequence.finish_reason = FinishReason.STOP
                sequence.num_stop_tokens = 1
                outcome.finished.append(sequence)
    due = lane.clock.take_limit_due(step.tick)
    if not due:
        return
    got_token = set(rows)
    for sequence in due:
        if sequence in got_token and not sequence.finish_reason:
            sequence.finish_reason = FinishReason.LENGTH
            outcome.finished.append(sequence)


def _still_here(lane: Lane, step: StepInFlight, token_ids: list[int]) -> tuple[list[Sequence], list[int]]:
    """Leave out the rows of sequences that have left since the plan."""
    rows, kept = [], []
    for sequence, admission, token_id in zip(step.sampled.sequences, step.sampled.admissions, token_ids, strict=True):
        if sequence.lane is lane and sequence.admission == admission:
            rows.append(sequence)
            kept.append(token_id)
    return rows, kept


def _sort_out(lane: Lane, step: StepInFlight, result: StepResult, outcome: StepOutcome) -> tuple[list[Sequence], list[int]]:
    """Go through a result row by row: sequences may have left since the plan, and the worker may be wrong."""
    reasons = dict(zip(result.failed_slots, result.failed_reasons, strict=False))
    for slot in result.failed_slots:
        reasons.setdefault(slot, "the worker gave no reason")
    unknown = set(result.unknown_slots)
    tokens_by_slot, problem = _tokens_by_slot(result)
    rows: list[Sequence] = []
    token_ids: list[int] = []
    sampled = step.sampled
    planned = [(*row, True) for row in zip(sampled.sequences, sampled.slots, sampled.admissions, strict=True)]
    planned += [(sequence, slot, admission, False) for sequence, slot, admission, _ in step.extended]
    for sequence, slot, admission, samples in planned:
        reason = reasons.pop(slot, None)
        tokens = tokens_by_slot.pop(slot, None)
        is_unknown = slot in unknown
        unknown.discard(slot)
        # It has ended or moved while the step ran.
        if sequence.lane is not lane or sequence.admission != admission:
            continue
        if is_unknown:
            sequence.is_sound = False
            sequence.num_times_lost += 1
            if sequence.num_times_lost <= LOST_MAX:
                outcome.lost.append(sequence)
                continue
            reason = "the worker does not hold it, or refuses it"
        if reason is None and samples:
            reason = problem or _why_not_one_token(tokens, lane.capacity.vocab_size)
        if reason is not None:
            sequence.is_sound = False
            error = RequestFailedError(f"worker: the step failed for this request: {reason}")
            outcome.failed.append((sequence, error))
        elif samples and tokens is not None:
            rows.append(sequence)
            token_ids.append(tokens[0])
    outcome.num_ignored_rows = len(reasons) + len(tokens_by_slot) + len(unknown)
    outcome.lost += _forks_of_failed(lane, outcome, rows)
    return rows, token_ids


def _forks_of_failed(lane: Lane, outcome: StepOutcome, rows: list[Sequence]) -> list[Sequence]:
    """Who forked from one that failed and has no result yet: the worker has wiped pages that it was to copy."""
    failed = {sequence for sequence, _ in outcome.failed}
    if not failed:
        return []
    known = failed.union(outcome.lost, rows)
    return [sequence for sequence in lane.running() if sequence.fork_source in failed and sequence not in known]


def _tokens_by_slot(result: StepResult) -> tuple[dict[int, list[int]], str | None]:
    """The result's tokens by slot, or what is wrong with its arrays."""
    counts = result.num_tokens or [1] * len(result.slots)
    if len(counts) != len(result.slots) or sum(counts) != len(result.token_ids):
        return {}, f"{len(result.slots)} slots, {len(counts)} counts and {len(result.token_ids)} tokens do not match"
    tokens: dict[int, list[int]] = {}
    start = 0
    for slot, count in zip(result.slots, counts, strict=True):
        tokens[slot] = result.token_ids[start : start + count]
        start += count
    return tokens, None


def _why_not_one_token(tokens: list[int] | None, vocab_size: int) -> str | None:
    if tokens is None:
        return "its row is missing from the result"
    if len(tokens) != 1:
        return f"{len(tokens)} tokens came back where one was asked for"
    if tokens[0] >= vocab_size:
        return f"token {tokens[0]} came back and the vocabulary has {vocab_size}"
    return None
