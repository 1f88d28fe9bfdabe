"""What a step is before and after: the plan as a diff, what the lane remembers of it while it is at the worker, and the result.

These mirror the messages of the wire (`StepPlan`, `StepResult`), as plain lists, so that the core runs without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.scheduler.logprobs import TokenLogs
from services.scheduler.sequence import Sequence
from services.scheduler.step_costs import PromptShare


@dataclass(slots=True)
class StepPlan:
    """One step of one lane, as a diff against what its worker holds.

    Attributes:
        step_id: Counts the lane's plans.
        freed_slots: Slots the worker lets go before anything else.
        new_sequences: Sequences that enter, with all their known tokens.
        page_slots: Slots that get pages.
        num_new_pages: How many each of them gets.
        new_pages: The page indices, flat.
        row_slots: Slots that compute; empty with `same_rows`.
        row_num_new_tokens: Tokens each computes; empty means one each.
        same_rows: The rows are those of the last plan, one token each.
        copied_pages: Pages to copy before anything is computed; all are read before any is written.
        page_copies: Where the copies go.
        num_rows: Rows, also with `same_rows`.
        num_tokens: Tokens computed, at most the token budget.
        preempted: Sequences that lost their pages to this plan, in that order.
    """

    step_id: int
    freed_slots: list[int] = field(default_factory=list)
    new_sequences: list[Sequence] = field(default_factory=list)
    page_slots: list[int] = field(default_factory=list)
    num_new_pages: list[int] = field(default_factory=list)
    new_pages: list[int] = field(default_factory=list)
    row_slots: list[int] = field(default_factory=list)
    row_num_new_tokens: list[int] = field(default_factory=list)
    same_rows: bool = False
    copied_pages: list[int] = field(default_factory=list)
    page_copies: list[int] = field(default_factory=list)
    num_rows: int = 0
    num_tokens: int = 0
    preempted: list[Sequence] = field(default_factory=list)

    def add_pages(self, slot: int, pages: list[int]) -> None:
        """Append pages to a slot's page table."""
        self.page_slots.append(slot)
        self.num_new_pages.append(len(pages))
        self.new_pages.extend(pages)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a step that sample; three lists in parallel.

    Attributes:
        sequences: Whose rows.
        slots: Their slots.
        admissions: Their stays in the lane; a slot may be given out again while a step is at the worker.
    """

    sequences: list[Sequence]
    slots: list[int]
    admissions: list[int]

    @classmethod
    def of(cls, sequences: Iterable[Sequence]) -> Rows:
        """The rows of running sequences."""
        kept = list(sequences)
        return cls(kept, [sequence.slot for sequence in kept], [sequence.admission for sequence in kept])

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.sequences + other.sequences, self.slots + other.slots, self.admissions + other.admissions)


@dataclass(slots=True)
class StepInFlight:
    """A plan whose result is not back.

    Attributes:
        tick: The lane's decode tick of the plan.
        version: The lane's version at the plan; while it stands, every row is still valid.
        num_tokens: Tokens it computes.
        sampled: Rows that sample a token, in order.
        extended: Sequences that compute a part of their prompt and sample nothing, with slot, stay and count after it.
        completed: Of those that sample, the ones whose prompt this step completes.
        share: What it computes of prompts; None where there are none.
    """

    tick: int
    version: int
    num_tokens: int
    sampled: Rows
    extended: list[tuple[Sequence, int, int, int]]
    completed: list[Sequence]
    share: PromptShare | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a worker sent back.

    Attributes:
        step_id: The plan answered.
        slots: Slots that sampled, in plan order.
        token_ids: The tokens, flat.
        num_tokens: Tokens a row; empty means one each.
        failed_slots: Slots whose row failed.
        failed_reasons: Why, one each, in words.
        unknown_slots: Slots of rows that the worker does not hold: it has forgotten them, or refused them when they entered.
        ended_slots: Slots whose sequence ends with the tokens given.
        duration_ns: Time at the worker, zero where it is not known.
        num_drafts: Drafts verified, in all rows together.
        logprobs: Of sampled tokens, by slot; only of those who asked.
        prompt_logprobs: Of prompt tokens, by slot: those after the tokens that were computed.
    """

    step_id: int
    slots: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    failed_slots: list[int] = field(default_factory=list)
    failed_reasons: list[str] = field(default_factory=list)
    unknown_slots: list[int] = field(default_factory=list)
    ended_slots: list[int] = field(default_factory=list)
    duration_ns: int = 0
    num_drafts: int = 0
    logprobs: dict[int, TokenLogs] = field(default_factory=dict)
    prompt_logprobs: dict[int, TokenLogs] = field(default_factory=dict)
