"""Which drafter a worker has, and a clear refusal of what cannot work together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from headrace.errors import ConfigError
from services.worker.batch_inputs import Limits
from services.worker.drafting.drafter import Drafter
from services.worker.drafting.ngram import NgramDrafter
from services.worker.drafting.speculation import Speculation

Method = Literal["off", "ngram", "auto"]

DRAFTERS: Final[dict[str, Callable[[], Drafter]]] = {"ngram": NgramDrafter}
"""By the method that asks for them."""

AUTO_DRAFTER: Final = "ngram"
"""Costs nothing but a look at the text, so it may always be tried."""


def make_speculation(method: Method, *, max_num_drafts: int, limits: Limits, now_ns: Callable[[], int]) -> Speculation | None:
    """What drafts for a worker; None for nothing.

    Args:
        method: As set; `auto` takes the drafter that may always be tried, and of its drafts what is worth verifying.
        max_num_drafts: Most drafts of a row.
        limits: The worker's sizes.
        now_ns: A monotonic clock, nanoseconds.

    Raises:
        ConfigError: The sizes leave no room for a row with drafts.
    """
    if method == "off":
        return None
    if max_num_drafts >= limits.max_num_batched_tokens:
        raise ConfigError(
            f"worker.num_speculative_tokens is {max_num_drafts} and worker.max_num_batched_tokens {limits.max_num_batched_tokens}: "
            "a step must hold a row's drafts and one token more; lower the former or raise the latter",
            param="worker.num_speculative_tokens",
        )
    drafter = DRAFTERS[AUTO_DRAFTER if method == "auto" else method]()
    return Speculation(drafter, max_num_drafts=max_num_drafts, is_adaptive=method == "auto", now_ns=now_ns)
