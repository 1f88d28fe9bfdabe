"""Which drafts a step verifies: asks the drafter, and takes what is worth its time.

A sequence that asks for a method by name gets all drafts that are found. For all others a draft is verified while it is expected to
raise the tokens a second of the whole step: by the rates at which proposals have been right (`acceptance.py`) and the times that
steps have taken (`step_costs.py`). A step that computes prompts is bound by its arithmetic, where a draft costs as much as
a token that is surely wanted: it carries none of these.

Source: choosing draft lengths by goodput, SmartSpec (2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from headrace.v1.common_pb2 import SpeculativeMethod
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from services.worker.batch_inputs import PlannedRows
from services.worker.drafting.acceptance import AcceptanceRates
from services.worker.drafting.drafter import Drafter, Drafts, Int32Array, Proposal
from services.worker.drafting.step_costs import Float64Array, StepCosts
from services.worker.entering import entering
from services.worker.step_tokens import StepTokens

GAIN_MIN: Final = 1.02
"""Drafts must be expected to raise a step's tokens a second by this factor: times and rates are not known better."""
_VALUE_MIN: Final = 0.02
"""A draft that is right so rarely is worth nothing anywhere."""


class Speculation:
    """Drafts for the steps of one worker.

    Args:
        drafter: Who guesses.
        max_num_drafts: Most drafts of a row.
        is_adaptive: Whether sequences that do not say get only what is worth its time.
        now_ns: A monotonic clock, nanoseconds.
    """

    def __init__(self, drafter: Drafter, *, max_num_drafts: int, is_adaptive: bool, now_ns: Callable[[], int]) -> None:
        self.max_num_drafts = max_num_drafts
        self._drafter = drafter
        self._is_adaptive = is_adaptive
        self._now_ns = now_ns
        self._rates = AcceptanceRates(drafter.first_rates)
        self._costs = StepCosts()
        # Slots whose sequences may have drafts, and those whose sequences get all that are found.
        self._slots: set[int] = set()
        self._eager: set[int] = set()
        # Of the step under way: its begin, its rows when it has no prompts, and what was proposed.
        self._begun_ns = 0
        self._num_rows = 0
        self._proposed: dict[int, Proposal] = {}

    def begin(self, plan: StepPlan, token_ids: Int32Array | None) -> None:
        """A step begins; some sequences enter with it.

        Args:
            plan: Its plan.
            token_ids: The plan's frame; None where it has none.
        """
        self._begun_ns = self._now_ns()
        self._proposed = {}
        for sequence, tokens, foretold in entering(plan, token_ids):
            self._enter(sequence, tokens, foretold)

    def draft(self, rows: PlannedRows, *, room: Callable[[int], int], num_free_tokens: int) -> Drafts | None:
        """Choose the drafts of the step.

        Args:
            rows: Its rows.
            room: Gives the most drafts that the row of a slot may carry, if it computes one token.
            num_free_tokens: Most drafts that still fit into the step.
        """
        slots = rows.slots.tolist()
        if rows.has_prompts:
            assert rows.counts is not None
            slots = [slot for slot, count in zip(slots, rows.counts.tolist(), strict=True) if count == 1 and slot in self._eager]
            self._num_rows = 0
        else:
            self._num_rows = len(slots)
            slots = [slot for slot in slots if slot in self._slots]
        proposals = self._drafter.propose(slots, self.max_num_drafts)
        self._proposed = {slot: proposal for slot, proposal in zip(slots, proposals, strict=True) if proposal is not None}
        return self._choose(room, num_free_tokens, num_rows=len(rows.slots)) if self._proposed else None

    def finish(self, tokens: StepTokens, *, num_tokens: int) -> None:
        """The step is over.

        Args:
            tokens: What it gave.
            num_tokens: Tokens that it computed.
        """
        for slot, sampled in tokens:
            if slot in self._slots:
                self._drafter.extend(slot, sampled)
                if proposal := self._proposed.get(slot):
                    self._rates.record(slot, proposal.grade, proposed=proposal.token_ids, sampled=sampled)
        if self._num_rows:
            duration_ns = self._now_ns() - self._begun_ns
            self._costs.record(num_rows=self._num_rows, num_drafts=num_tokens - self._num_rows, duration_ns=duration_ns)

    def reset(self) -> None:
        """Forget every sequence; what was measured stays."""
        self._drafter.reset()
        self._slots.clear()
        self._eager.clear()
        self._proposed = {}

    def _enter(self, sequence: NewSequence, token_ids: Int32Array, foretold: Int32Array) -> None:
        slot, method = sequence.slot, sequence.speculative.method
        self._slots.discard(slot)
        self._eager.discard(slot)
        if not sequence.max_num_drafts:
            return
        self._slots.add(slot)
        self._drafter.enter(slot, token_ids, foretold)
        self._rates.enter(slot)
        if method == SpeculativeMethod.SPECULATIVE_METHOD_NGRAM or (not method and not self._is_adaptive):
            self._eager.add(slot)

    def _choose(self, room: Callable[[int], int], num_free_tokens: int, *, num_rows: int) -> Drafts | None:
        """Of what is proposed, the drafts to verify."""
        found = [
            (slot, proposal.token_ids[:most], proposal.grade) for slot, proposal in self._proposed.items() if (most := room(slot))
        ]
        # What does not fit is left out, from the last row on.
        counts = _within(self._counts(found, num_rows), num_free_tokens)
        taken = [(slot, token_ids[:count]) for (slot, token_ids, _), count in zip(found, counts, strict=True) if count]
        if not taken:
            return None
        return Drafts(
            slots=np.array([slot for slot, _ in taken], dtype=np.int64),
            counts=np.array([len(token_ids) for _, token_ids in taken], dtype=np.int64),
            token_ids=np.array([token_id for _, token_ids in taken for token_id in token_ids], dtype=np.int64),
        )

    def _counts(self, found: list[tuple[int, list[int], int]], num_rows: int) -> list[int]:
        """How many drafts to verify, of slots with drafts and their grades."""
        counts = [len(token_ids) if slot in self._eager else 0 for slot, token_ids, _ in found]
        values: dict[int, Float64Array] = {}
        for index, (slot, token_ids, grade) in enumerate(found):
            if slot not in self._eager and (rate := self._rates.rate(slot, grade)) >= _VALUE_MIN:
                values[index] = np.power(rate, np.arange(1, len(token_ids) + 1))
        if not values:
            return counts
        num_eager = sum(counts)
        offered = np.concatenate(list(values.values()))
        times_ns = self._costs.expected_ns(num_rows=num_rows, least_drafts=num_eager, most_drafts=num_eager + len(offered))
        if times_ns is not None:
            least = _least_value(offered, times_ns, num_tokens=num_rows + num_eager)
            for index, each in values.items():
                counts[index] = int(np.count_nonzero(each >= least))
        return counts


def _least_value(values: Float64Array, times_ns: Float64Array, *, num_tokens: int) -> float:
    """The least probability to be right that makes a draft worth verifying; more than 1 where none is.

    Args:
        values: Of all drafts on offer.
        times_ns: Expected times of the step with 0, 1, … all of them.
        num_tokens: Tokens that the step gives without them.
    """
    best_first = np.sort(values)[::-1]
    per_ns = (num_tokens + np.concatenate(([0.0], np.cumsum(best_first)))) / times_ns
    best = int(per_ns.argmax())
    return float(best_first[best - 1]) if per_ns[best] > GAIN_MIN * per_ns[0] else 2.0


def _within(counts: list[int], num_free: int) -> list[int]:
    """Cut counts so that their sum is at most `num_free`."""
    cut = []
    for count in counts:
        cut.append(min(count, num_free))
        num_free -= cut[-1]
    return cut
