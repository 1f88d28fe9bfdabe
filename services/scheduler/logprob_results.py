"""Takes the logprobs of a step's result to the sequences that asked. Only called while some have."""

from __future__ import annotations

from headrace.errors import HeadraceError, RequestFailedError
from services.scheduler.sequence import Sequence
from services.scheduler.step_plan import StepInFlight, StepResult
from services.scheduler.token_fanout import RowTokens


def take_logprobs(
    step: StepInFlight, result: StepResult, gave: RowTokens, failed: list[tuple[Sequence, HeadraceError]]
) -> RowTokens:
    """Append logprobs to sequences that got tokens, and to those whose prompts went on.

    Args:
        step: The plan answered.
        result: What came back.
        gave: Who got tokens, which are not appended yet; all are still in the lane.
        failed: Sequences whose logprobs are missing are added; what they were given is dropped.

    Returns:
        `gave`, the same object where nothing is missing.
    """
    for sequence, slot, admission, _ in step.extended:
        _take_of_prompt(sequence, slot, admission, result)
    completed = set(step.completed)
    for sequence, slot, admission in zip(step.sampled.sequences, step.sampled.slots, step.sampled.admissions, strict=True):
        if sequence in completed:
            _take_of_prompt(sequence, slot, admission, result)
    missing = {sequence for sequence, tokens in gave if sequence.tells and not _take(sequence, len(tokens), result)}
    if not missing:
        return gave
    kept = RowTokens([], [])
    for sequence, tokens in gave:
        if sequence in missing:
            failed.append((sequence, RequestFailedError("worker: the step gave no logprobs for this request, which wants some")))
            continue
        kept.rows.append(sequence)
        kept.token_ids += tokens
        kept.counts.append(len(tokens))
    return kept


def _take_of_prompt(sequence: Sequence, slot: int, admission: int, result: StepResult) -> None:
    told = result.prompt_logprobs.get(slot)
    is_here = sequence.slot == slot and sequence.admission == admission
    if told is None or not is_here or not sequence.wants_prompt_logprobs or sequence.prompt_logprobs is None:
        return
    if told.num_top == sequence.prompt_logprobs.num_top:
        sequence.prompt_logprobs.append(told)


def _take(sequence: Sequence, num_tokens: int, result: StepResult) -> bool:
    """Take those of sampled tokens; gives whether all that was asked for is here."""
    if sequence.wants_prompt_logprobs:
        assert sequence.prompt_logprobs is not None
        if len(sequence.prompt_logprobs) != sequence.num_prompt_tokens - 1:
            return False
    if sequence.logprobs is None:
        return True
    told = result.logprobs.get(sequence.slot)
    if told is None or len(told) != num_tokens or told.num_top != sequence.logprobs.num_top:
        return False
    sequence.logprobs.append(told)
    return True
