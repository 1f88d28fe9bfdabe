"""Will the pages of a lane last if one more sequence enters?

Running sequences grow, and free their pages when they end. What they will need at most is needed when one of them ends: just before
the one with r tokens to go is done, all with r or more to go have grown by r. The greatest of these sums is the peak. Adding up
what all will ever need instead would count pages that are never held at the same time, and admit too few.

Source: the Past-Future scheduler (ASPLOS 2025).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from services.scheduler.lane import Lane
from services.scheduler.output_lengths import LengthEstimate
from services.scheduler.radix_tree import Match
from services.scheduler.sequence import Sequence

PEAK_SHARE_MAX: Final = 0.95
"""Of the pages; what is left is for outputs that become longer than expected."""

_GOLDEN_RATIO_64: Final = 0x9E37_79B9_7F4A_7C15
_MASK_64: Final = 2**64 - 1


def is_future_sound(lane: Lane, sequence: Sequence, match: Match, lengths: LengthEstimate) -> bool:
    """Whether the lane's pages are expected to last for those that run and this sequence; `can_admit` holds.

    Alone it may always enter: it will end at worst where the pages do.
    """
    if not lane.num_running:
        return True
    page_size = lane.kv.pool.page_size
    longest = lengths.longest
    if longest is not None and lane.kv.num_left(sequence, match) >= (lane.num_running + 1) * (longest // page_size + 1):
        return True
    return peak_pages(lane, sequence, match, lengths) <= PEAK_SHARE_MAX * lane.kv.pool.num_pages


def peak_pages(lane: Lane, sequence: Sequence, match: Match, lengths: LengthEstimate) -> float:
    """Most pages that will be held at once, as far as the lengths tell."""
    running = [*lane.running(), sequence]
    num_outputs = np.array([one.num_output_tokens for one in running])
    limits = np.array([one.token_limit(lane.capacity.max_model_len) - one.num_prompt_tokens for one in running])
    draws = np.array([_draw(one) for one in running[:-1]] + [0.5])
    to_go = np.maximum(1.0, lengths.expected(num_outputs, np.maximum(limits, num_outputs), draws) - num_outputs)
    pool = lane.kv.pool
    num_used = pool.num_pages - lane.kv.num_left(sequence, match)
    held = np.array([len(one.pages) for one in running[:-1]] + [pool.pages_for(sequence.num_tokens)], dtype=np.float64)
    # Pages that several share are held by each in part, so that the sum is what is in use.
    held *= num_used / held.sum()
    order = np.argsort(-to_go, kind="stable")
    growing = np.arange(1, len(running) + 1) * (to_go[order] / pool.page_size)
    return float((np.cumsum(held[order]) + growing).max())


def _draw(sequence: Sequence) -> float:
    """A number from 0 to below 1 that a sequence keeps; those of many are spread evenly."""
    return (sequence.stream_id * _GOLDEN_RATIO_64 & _MASK_64) / 2**64
