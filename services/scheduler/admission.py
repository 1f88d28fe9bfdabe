"""What a request must be before it may wait, and still be before it runs; refused with the numbers when it can never run."""

from __future__ import annotations

from typing import Final

from headrace.errors import DeadlineExceededError, InvalidRequestError, NotFoundError, RequestFailedError, UnavailableError
from services.scheduler.deadlines import BestSpeed
from services.scheduler.lanes import Lanes
from services.scheduler.logprobs import NUMBERS_MAX
from services.scheduler.sequence import Sequence

LANES_LOST_MAX: Final = 3
"""What was on so many lanes when they were lost may be what ends them."""
HARMLESS_TOKENS: Final = 32
"""A sequence that got so many tokens on a lane is not what ended it, nor those before."""


def check_lane(model: str, lanes: Lanes, held: str) -> None:
    """Refuse a worker group that holds another model than the lanes that are here.

    Args:
        model: The group's.
        lanes: Those that are here.
        held: Theirs.

    Raises:
        InvalidRequestError: It names both.
    """
    if len(lanes) and model != held:
        raise InvalidRequestError(
            f"scheduler: a lane with model {model!r} cannot join lanes with model {held!r}, before the last of them has left",
            param="capacity.model",
        )


def check_request(sequence: Sequence, model: str, now_ns: int) -> None:
    """Refuse what needs no look at its length.

    Args:
        sequence: The request.
        model: The model that the lanes hold or, while there is none, last held; empty before the first lane.
        now_ns: The core's clock.

    Raises:
        UnavailableError: No lane has ever joined.
        NotFoundError: It wants another model.
        DeadlineExceededError: Its deadline is over.
        InvalidRequestError: It wants no token.
    """
    if not model:
        raise UnavailableError("scheduler: no worker has joined yet; retry later")
    if sequence.model != model:
        raise NotFoundError(f"scheduler: model {sequence.model!r} is not here, only {model!r}", param="model")
    if 0 < sequence.deadline_ns <= now_ns:
        raise DeadlineExceededError("scheduler: the request's deadline had passed when it arrived")
    if sequence.stopping.max_tokens == 0:
        raise InvalidRequestError("max_tokens must be at least 1, got 0", param="max_tokens")


def check_size(sequence: Sequence, max_prompt_tokens: int) -> None:
    """Refuse a sequence that no lane could hold even alone.

    Raises:
        InvalidRequestError: It has no token, or more than fit with one output token.
    """
    if sequence.num_tokens < 1:
        raise InvalidRequestError("the prompt must have at least 1 token, got 0", param="prompt")
    if sequence.num_tokens > max_prompt_tokens:
        raise InvalidRequestError(
            f"the prompt has {sequence.num_tokens} tokens and model {sequence.model!r} takes at most {max_prompt_tokens} here, "
            "so that one output token still fits the context length and the KV pages; shorten it",
            param="prompt",
        )
    if sequence.prompt_logprobs is not None:
        num_numbers = sequence.num_prompt_tokens * (1 + sequence.prompt_logprobs.num_top)
        if num_numbers > NUMBERS_MAX:
            raise InvalidRequestError(
                f"prompt_logprobs would be {num_numbers} numbers, {1 + sequence.prompt_logprobs.num_top} for each of "
                f"{sequence.num_prompt_tokens} tokens; the limit is {NUMBERS_MAX}: ask for fewer, or shorten the prompt",
                param="prompt_logprobs",
            )


def check_drafts(sequence: Sequence, max_num_drafts: int) -> None:
    """Refuse to be asked for more drafts than any lane verifies. One that has outputs is not asked again: they do not depend on it.

    Raises:
        InvalidRequestError: It names the limit.
    """
    if sequence.num_output_tokens or not sequence.wants_drafts:
        return
    if not max_num_drafts:
        raise InvalidRequestError(
            "speculative is asked for and the workers here do not speculate: leave it out, or set worker.speculative to auto",
            param="speculative",
        )
    if (sequence.num_drafts_asked or 0) > max_num_drafts:
        raise InvalidRequestError(
            f"speculative.num_speculative_tokens is {sequence.num_drafts_asked} and the workers verify {max_num_drafts} at most; "
            "lower it, or raise worker.num_speculative_tokens",
            param="speculative.num_speculative_tokens",
        )


def check_still_possible(sequence: Sequence, model: str, max_prompt_tokens: int) -> None:
    """Refuse a sequence that was taken and for which the lanes have changed since.

    Raises:
        NotFoundError: Its model is gone.
        InvalidRequestError: It is longer than the lanes that are left take.
    """
    if sequence.model != model:
        raise NotFoundError(f"scheduler: model {sequence.model!r} is gone, {model!r} is here now", param="model")
    if sequence.num_tokens > max_prompt_tokens:
        raise InvalidRequestError(
            f"the prompt has {sequence.num_tokens} tokens; the lanes that are left take {max_prompt_tokens}", param="prompt"
        )


def count_lost_lane(sequence: Sequence) -> None:
    """Count a lane that was lost with a sequence on it, if its worker had been told of it.

    Raises:
        RequestFailedError: They are too many to risk another one.
    """
    if not sequence.is_announced:
        return
    # While it decodes, what it had scheduled of its prefill is what it came with.
    if sequence.is_sound and sequence.num_tokens - sequence.num_scheduled >= HARMLESS_TOKENS:
        sequence.num_lanes_lost = 0
        return
    sequence.num_lanes_lost += 1
    if sequence.num_lanes_lost >= LANES_LOST_MAX:
        raise RequestFailedError(
            f"scheduler: {LANES_LOST_MAX} workers ended while they had request {sequence.request_id!r} of {sequence.num_tokens} "
            "tokens, and no more are risked for it; the workers' logs say what they ended with"
        )


def check_deadline(sequence: Sequence, speed: BestSpeed, lanes: Lanes, now_ns: int) -> None:
    """Refuse a sequence before its prefill when its deadline cannot be met any more.

    Raises:
        DeadlineExceededError: Says what is left, and what it takes at the lanes' best to the first token, or the fewest asked for.
    """
    if not sequence.deadline_ns:
        return
    _, num_cached_tokens = lanes.longest_prefix(sequence)
    num_outputs = max(1, sequence.stopping.min_tokens - sequence.num_output_tokens)
    # At best every draft is right.
    num_a_step = 1 + lanes.most_drafts()
    least_ns = speed.least_ns(sequence.num_tokens - num_cached_tokens, 1 - (1 - num_outputs) // num_a_step)
    left_ns = sequence.deadline_ns - now_ns
    if least_ns > left_ns:
        raise DeadlineExceededError(
            f"scheduler: the request's deadline is {max(0, left_ns) / 1e9:.3f} s away and it would take {least_ns / 1e9:.3f} s at "
            "least; dropped before its prefill"
        )
