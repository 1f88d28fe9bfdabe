"""Applies a step's result to its lane: appends tokens, finds the sequences that ended, makes the batches for the detokenizers.

A result is input from another process: unknown slots, missing rows and impossible tokens end the requests they concern, nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.errors import HeadraceError, RequestFailedError
from services.scheduler.lane import Lane
from services.scheduler.logprob_results import take_logprobs
from services.scheduler.sequence import FinishReason, Sequence
from services.scheduler.step_plan import StepInFlight, StepResult
from services.scheduler.token_fanout import RowTokens, StreamBatch


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
        num_limited_tokens: Prompt tokens of a step that was to take no more of them; 0 for a step that was not limited.
    """

    batches: list[StreamBatch] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, HeadraceError]] = field(default_factory=list)
    lost: list[Sequence] = field(default_factory=list)
    num_ignored_rows: int = 0
    num_tokens: int = 0
    num_limited_tokens: int = 0


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
    _learn(lane, step, result, outcome)
    if not _is_complete(lane, step, result):
        gave = _sort_out(lane, step, result, outcome)
    elif step.version == lane.version:
        gave = RowTokens(step.sampled.sequences, result.token_ids, result.num_tokens)
    else:
        gave = _still_here(lane, step, result)
    for sequence, _slot, admission, num_scheduled in step.extended:
        if sequence.lane is lane and sequence.admission == admission:
            sequence.num_computed = num_scheduled
    if 0 in gave.counts:
        gave = _without_withheld(lane, gave)
    if lane.fanout.num_telling:
        gave = take_logprobs(step, result, gave, outcome.failed)
    _publish(lane, step, gave)
    if gave.rows:
        if gave.counts:
            _append_several(lane, gave, outcome)
        else:
            _append(lane, gave, outcome)
        outcome.batches = lane.fanout.split(gave, version=lane.version)
        if lane.fanout.num_telling:
            for batch in outcome.batches:
                batch.has_logprobs = any(sequence.tells for sequence in batch.sequences)
        if result.ended_slots:
            _end(lane, result.ended_slots, gave, outcome)
    _find_limits(lane, step, gave.rows, outcome)
    if outcome.finished:
        for batch in outcome.batches:
            batch.mark_finished()
    return outcome


def _learn(lane: Lane, step: StepInFlight, result: StepResult, outcome: StepOutcome) -> None:
    """Take note of what the step cost."""
    if (share := step.share) is not None and share.num_tokens:
        lane.costs.record_share(share, result.num_drafts, result.duration_ns)
        outcome.num_limited_tokens = share.num_tokens if share.is_limited else 0
    else:
        lane.costs.record_decodes(step.num_tokens + result.num_drafts, result.duration_ns)


def _without_withheld(lane: Lane, gave: RowTokens) -> RowTokens:
    """Leave out the rows that gave no token, their grammars not being there yet: each computes its last known token again."""
    kept = RowTokens([], [])
    for sequence, tokens in gave:
        if tokens:
            kept.rows.append(sequence)
            kept.token_ids += tokens
            kept.counts.append(len(tokens))
        else:
            lane.clock.advance(sequence, -1)
            if not sequence.is_sound:
                lane.kv.withheld[sequence] = None
    return kept


def _publish(lane: Lane, step: StepInFlight, gave: RowTokens) -> None:
    """Prompts that got their first token are good: others may share them. The step completed them, or one before it did."""
    if step.completed or lane.kv.withheld:
        got_token = set(gave.rows)
        for sequence in (*step.completed, *lane.kv.withheld):
            if sequence in got_token:
                lane.kv.publish(sequence)


def _is_complete(lane: Lane, step: StepInFlight, result: StepResult) -> bool:
    """Whether every row that was to sample did, and nothing else is said."""
    if result.failed_slots or result.unknown_slots or result.slots != step.sampled.slots:
        return False
    if max(result.token_ids, default=0) >= lane.capacity.vocab_size:
        return False
    counts = result.num_tokens
    if not counts:
        return len(result.token_ids) == len(result.slots)
    return (
        len(counts) == len(result.slots)
        and sum(counts) == len(result.token_ids)
        and all(map(_may_give, step.sampled.sequences, counts))
    )


def _may_give(sequence: Sequence, num_tokens: int) -> bool:
    """Whether a step can have given a sequence so many tokens."""
    least = 0 if sequence.constraint is not None else 1
    return least <= num_tokens <= 1 + sequence.max_num_drafts and sequence.num_tokens + num_tokens <= sequence.max_num_tokens


def _append(lane: Lane, gave: RowTokens, outcome: StepOutcome) -> None:
    """Append one token to each sequence."""
    for sequence, token_id in zip(gave.rows, gave.token_ids, strict=True):
        sequence.tokens.append(token_id)
    lane.num_tokens += len(gave.rows)
    if not lane.stop_token_ids.keys().isdisjoint(gave.token_ids):
        for sequence, token_id in zip(gave.rows, gave.token_ids, strict=True):
            if sequence.is_stop(token_id):
                _stop(sequence, outcome)


def _append_several(lane: Lane, gave: RowTokens, outcome: StepOutcome) -> None:
    """Append tokens to each sequence, up to one that ends it, and move those on that got more than one; `gave` is cut alike."""
    may_stop = not lane.stop_token_ids.keys().isdisjoint(gave.token_ids)
    kept: list[int] = []
    counts: list[int] = []
    for sequence, tokens in gave:
        for count, token_id in enumerate(tokens, start=1):
            sequence.tokens.append(token_id)
            if may_stop and sequence.is_stop(token_id):
                _stop(sequence, outcome)
                del tokens[count:]
                break
        kept += tokens
        counts.append(len(tokens))
        if len(tokens) > 1:
            lane.clock.advance(sequence, len(tokens) - 1)
    gave.token_ids, gave.counts = kept, counts
    lane.num_tokens += len(kept)


def _stop(sequence: Sequence, outcome: StepOutcome) -> None:
    """A sequence's last token ends it."""
    sequence.finish_reason = FinishReason.STOP
    sequence.num_stop_tokens = 1
    outcome.finished.append(sequence)


def _end(lane: Lane, slots: list[int], gave: RowTokens, outcome: StepOutcome) -> None:
    """Sequences whose constraint is fulfilled, and lets nothing follow, end with the tokens that they got."""
    ended = set(slots)
    for sequence, tokens in gave:
        if sequence.slot in ended and tokens and not sequence.finish_reason:
            sequence.finish_reason = FinishReason.STOP
            sequence.num_stop_tokens = int(tokens[-1] in sequence.stopping.stop_token_ids)
            outcome.finished.append(sequence)


def _find_limits(lane: Lane, step: StepInFlight, rows: list[Sequence], outcome: StepOutcome) -> None:
    due = lane.clock.take_limit_due(step.tick)
    if not due:
        return
    got_token = set(rows)
    for sequence in due:
        if sequence in got_token and not sequence.finish_reason:
            sequence.finish_reason = FinishReason.LENGTH
            outcome.finished.append(sequence)


def _still_here(lane: Lane, step: StepInFlight, result: StepResult) -> RowTokens:
    """Leave out the rows of sequences that have left since the plan."""
    kept = RowTokens([], [])
    gave = RowTokens(step.sampled.sequences, result.token_ids, result.num_tokens)
    for (sequence, tokens), admission in zip(gave, step.sampled.admissions, strict=True):
        if sequence.lane is lane and sequence.admission == admission:
            kept.rows.append(sequence)
            kept.token_ids += tokens
            if gave.counts:
                kept.counts.append(len(tokens))
    return kept


def _sort_out(lane: Lane, step: StepInFlight, result: StepResult, outcome: StepOutcome) -> RowTokens:
    """Go through a result row by row: sequences may have left since the plan, and the worker may be wrong."""
    reasons = dict(zip(result.failed_slots, result.failed_reasons, strict=False))
    for slot in result.failed_slots:
        reasons.setdefault(slot, "the worker gave no reason")
    unknown = set(result.unknown_slots)
    tokens_by_slot, problem = _tokens_by_slot(result)
    gave = RowTokens([], [])
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
            reason = problem or _why_not_right(sequence, tokens, lane.capacity.vocab_size)
        if reason is not None:
            sequence.is_sound = False
            error = RequestFailedError(f"worker: the step failed for this request: {reason}")
            outcome.failed.append((sequence, error))
        elif samples and tokens is not None:
            gave.rows.append(sequence)
            gave.token_ids += tokens
            gave.counts.append(len(tokens))
    outcome.num_ignored_rows = len(reasons) + len(tokens_by_slot) + len(unknown)
    outcome.lost += _forks_of_failed(lane, outcome, gave.rows)
    return gave


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


def _why_not_right(sequence: Sequence, tokens: list[int] | None, vocab_size: int) -> str | None:
    if tokens is None:
        return "its row is missing from the result"
    if not _may_give(sequence, len(tokens)):
        return (
            f"{len(tokens)} tokens came back; with {sequence.max_num_drafts} drafts at most, and {sequence.num_tokens} tokens "
            f"of {sequence.max_num_tokens}, it cannot be so many"
        )
    if max(tokens, default=0) >= vocab_size:
        return f"token {max(tokens)} came back and the vocabulary has {vocab_size}"
    return None
