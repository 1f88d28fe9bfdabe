"""The parts of a step that is too large for the memory: computed one after the other they give the same."""

from __future__ import annotations

from typing import Final

import torch

from services.worker.layers.ops import StepTensors

PART_TOKENS_MIN: Final = 16
"""A step of so few tokens that finds no memory will find none in parts either."""


def parts_of(step: StepTensors, max_tokens: int) -> list[tuple[StepTensors, torch.Tensor]]:
    """Cut a step into steps of at most so many tokens, to be computed in this order; a row may lie in several of them.

    Returns:
        Each with the indices of its sampled tokens among those of the whole step.
    """
    num_tokens = step.token_ids.shape[0]
    return [_part(step, first, min(first + max_tokens, num_tokens)) for first in range(0, num_tokens, max_tokens)]


def _part(step: StepTensors, first: int, end: int) -> tuple[StepTensors, torch.Tensor]:
    flat_ends = step.row_counts.cumsum(0)
    flat_starts = flat_ends - step.row_counts
    rows = slice(int((flat_ends <= first).sum()), int((flat_starts < end).sum()))
    begins = flat_starts[rows].clamp(min=first)
    (sampled,) = ((step.sampled_tokens >= first) & (step.sampled_tokens < end)).nonzero(as_tuple=True)
    part = StepTensors(
        token_ids=step.token_ids[first:end],
        positions=step.positions[first:end],
        slot_mapping=step.slot_mapping[first:end],
        row_starts=step.row_starts[rows] + begins - flat_starts[rows],
        row_counts=flat_ends[rows].clamp(max=end) - begins,
        page_tables=step.page_tables[rows],
        num_decode_rows=max(0, min(step.num_decode_rows, rows.stop) - rows.start),
        sampled_tokens=step.sampled_tokens[sampled] - first,
    )
    return part, sampled
