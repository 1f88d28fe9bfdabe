"""What the core counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Running totals since the core's start.

    Attributes:
        num_steps: Steps whose results came.
        num_scheduled_tokens: Tokens that plans had computed.
        num_output_tokens: Tokens sampled and taken.
        num_limited_steps: Steps that took less of prompts than there was budget for, so as not to keep decodes waiting.
        num_limited_tokens: Prompt tokens of these.
        num_preemptions: Times a running sequence lost its place, for want of pages or to one of a higher class.
        num_requeued: Times one lost its lane or was unknown to its worker.
        num_forked: Sequences that took a running one's prompt over.
        num_held: Times a sequence waited for the same prefix to be computed for another.
        num_ignored_results: Results of steps that nobody waited for.
        num_ignored_rows: Rows of slots that no plan had.
    """

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_output_tokens: int = 0
    num_limited_steps: int = 0
    num_limited_tokens: int = 0
    num_preemptions: int = 0
    num_requeued: int = 0
    num_forked: int = 0
    num_held: int = 0
    num_ignored_results: int = 0
    num_ignored_rows: int = 0
