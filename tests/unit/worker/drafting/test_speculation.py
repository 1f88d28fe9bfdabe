"""Goal: drafts are verified where they are expected to pay. Method: a drafter, a clock and step times that the test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from headrace.errors import ConfigError
from headrace.v1.common_pb2 import SpeculativeMethod, SpeculativeParams
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from services.worker.batch_inputs import Limits, PlannedRows
from services.worker.drafting.acceptance import AcceptanceRates
from services.worker.drafting.drafter import Drafts, Int32Array, Proposal
from services.worker.drafting.factory import make_speculation
from services.worker.drafting.speculation import Speculation
from services.worker.drafting.step_costs import StepCosts
from services.worker.step_tokens import StepTokens


class Oracle:
    """Proposes the same tokens for every row, of the grade that is set for its slot."""

    first_rates = (0.2, 0.9)

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = list(token_ids)
        self.grades: dict[int, int] = {}
        self.texts: dict[int, list[int]] = {}
        self.foretold: dict[int, list[int]] = {}

    def enter(self, slot: int, token_ids: Int32Array, foretold: Int32Array) -> None:
        self.texts[slot] = token_ids.tolist()
        self.foretold[slot] = foretold.tolist()

    def extend(self, slot: int, token_ids: list[int]) -> None:
        self.texts[slot] += token_ids

    def propose(self, slots: Sequence[int], max_num_drafts: int) -> list[Proposal | None]:
        return [Proposal(self.token_ids[:max_num_drafts], self.grades.get(slot, 1)) if self.token_ids else None for slot in slots]

    def reset(self) -> None:
        self.texts.clear()


class Steps:
    """Steps of a worker whose time is `base_ns` and `token_ns` a token."""

    def __init__(self, *, is_adaptive: bool = True, base_ns: int = 1000, token_ns: int = 0) -> None:
        self.now_ns = 0
        self.base_ns = base_ns
        self.token_ns = token_ns
        self.drafter = Oracle(1, 2, 3, 4)
        self.silent: set[int] = set()
        self.speculation = Speculation(self.drafter, max_num_drafts=4, is_adaptive=is_adaptive, now_ns=lambda: self.now_ns)

    def enter(self, slot: int, method: SpeculativeMethod | None = None, *, max_num_drafts: int = 4) -> None:
        speculative = SpeculativeParams(method=method) if method is not None else None
        entering = NewSequence(slot=slot, speculative=speculative, max_num_drafts=max_num_drafts)
        self.speculation.begin(StepPlan(new_sequences=[entering]), None)

    def step(
        self, *slots: int, sampled: Sequence[int] = (9,), room: int = 4, free: int = 100, prompt: int | None = None
    ) -> list[int]:
        """One step in which every row samples these tokens; gives the drafts of each slot. `prompt` is the slot of one more row."""
        for slot in slots:
            if slot not in self.drafter.texts and slot not in self.silent:
                self.enter(slot)
        self.speculation.begin(StepPlan(), None)
        everyone = [*slots, *([prompt] if prompt is not None else [])]
        rows = PlannedRows(np.array(everyone), None if prompt is None else np.array([1] * len(slots) + [7]), ())
        drafts = self.speculation.draft(rows, room=lambda slot: room, num_free_tokens=free)
        num_tokens = rows.num_tokens + (len(drafts.token_ids) if drafts is not None else 0)
        self.now_ns += self.base_ns + self.token_ns * num_tokens
        tokens = StepTokens(list(slots), list(sampled) * len(slots), [len(sampled)] * len(slots))
        self.speculation.finish(tokens, num_tokens=num_tokens)
        return counts(drafts, slots)

    def settle(self, *slots: int, sampled: Sequence[int] = (9,), num_steps: int = 60) -> list[int]:
        """Steps until what is chosen stays; gives the last choice."""
        for _ in range(num_steps):
            found = self.step(*slots, sampled=sampled)
        return found


def counts(drafts: Drafts | None, slots: Sequence[int]) -> list[int]:
    found = dict(zip(drafts.slots.tolist(), drafts.counts.tolist(), strict=True)) if drafts is not None else {}
    return [found.get(slot, 0) for slot in slots]


def test_nothing_is_drafted_before_a_plain_step_is_known() -> None:
    steps = Steps()
    assert [steps.step(0) for _ in range(4)] == [[0], [0], [0], [4]]


def test_right_drafts_are_taken_as_far_as_there_is_room() -> None:
    steps = Steps(token_ns=100)
    assert steps.settle(0, sampled=(1, 2, 3, 4, 5)) == [4]
    assert steps.step(0, room=2) == [2]
    assert steps.step(0, free=1) == [1]
    assert steps.step(0, free=0) == [0]


def test_wrong_drafts_are_given_up_and_taken_up_again_when_they_would_have_been_right() -> None:
    steps = Steps(token_ns=100)
    assert steps.settle(0, sampled=(9,)) == [0]
    # Nothing is verified, yet the first token of each proposal is seen to be right.
    assert steps.settle(0, sampled=(1,), num_steps=40) == [4]


def test_drafts_that_cost_more_than_they_give_are_left() -> None:
    assert Steps(base_ns=10_000, token_ns=0).settle(0, sampled=(1, 2, 9)) == [4]
    # Where the time is the tokens', even a draft that is nearly always right gains nothing.
    assert Steps(base_ns=0, token_ns=1000).settle(0, sampled=(1, 2, 3, 4, 5)) == [0]


def test_of_several_rows_the_likelier_drafts_come_first() -> None:
    steps = Steps(base_ns=1000, token_ns=150)
    for _ in range(40):
        steps.drafter.grades = {0: 0, 1: 1}
        chosen = steps.step(0, 1, sampled=(1, 9))
    assert steps.speculation._rates.rate(0, 0) == pytest.approx(steps.speculation._rates.rate(1, 1), abs=0.1)
    steps.enter(0), steps.enter(1)
    steps.drafter.token_ids = [1]
    for _ in range(20):
        steps.speculation._rates.record(0, 0, proposed=[1], sampled=[9])
        steps.speculation._rates.record(1, 1, proposed=[1], sampled=[1])
    chosen = steps.step(0, 1)
    assert chosen == [0, 1]


def test_steps_with_prompts_carry_only_drafts_that_were_asked_for() -> None:
    steps = Steps()
    steps.enter(1, SpeculativeMethod.SPECULATIVE_METHOD_NGRAM)
    steps.settle(0, 1, sampled=(1, 2, 3, 4, 5))
    assert steps.step(0, 1) == [4, 4]
    assert steps.step(0, 1, prompt=5) == [0, 4]


def test_a_request_has_its_own_method_and_others_the_workers() -> None:
    named, adaptive = SpeculativeMethod.SPECULATIVE_METHOD_NGRAM, SpeculativeMethod.SPECULATIVE_METHOD_AUTO
    steps = Steps(is_adaptive=True, base_ns=0, token_ns=1000)
    steps.enter(0), steps.enter(1, named), steps.enter(2, adaptive)
    assert steps.settle(0, 1, 2, sampled=(9,)) == [0, 4, 0]
    steps = Steps(is_adaptive=False, base_ns=0, token_ns=1000)
    steps.enter(0), steps.enter(1, named), steps.enter(2, adaptive)
    assert steps.settle(0, 1, 2, sampled=(9,)) == [4, 4, 0]
    # The slot's next sequence is not bound by it.
    steps.enter(0, adaptive)
    assert steps.settle(0, 1, 2, sampled=(9,)) == [0, 4, 0]


def test_the_drafter_knows_all_tokens_and_what_is_foretold() -> None:
    steps = Steps()
    plan = StepPlan(
        new_sequences=[
            NewSequence(slot=3, num_tokens=2, num_foretold_tokens=1, max_num_drafts=2),
            NewSequence(slot=5, num_tokens=1, max_num_drafts=2),
            NewSequence(slot=6, num_tokens=1),
        ]
    )
    steps.speculation.begin(plan, np.array([10, 11, 12, 20, 30], dtype=np.int32))
    assert steps.drafter.texts == {3: [10, 11], 5: [20]}, "who may have no drafts costs nothing"
    assert steps.drafter.foretold == {3: [12], 5: []}
    steps.silent = {6}
    assert steps.step(3, 5, 6, sampled=(1, 2)) == [0, 0, 0]
    assert steps.drafter.texts == {3: [10, 11, 1, 2], 5: [20, 1, 2]}


def test_a_slot_given_to_a_sequence_without_drafts_has_none() -> None:
    steps = Steps(is_adaptive=False)
    assert steps.step(0) == [4]
    steps.enter(0, max_num_drafts=0)
    assert steps.step(0) == [0]


def test_no_proposal_no_draft() -> None:
    steps = Steps()
    steps.drafter.token_ids = []
    assert steps.settle(0) == [0]


def test_forgetting_keeps_what_was_measured() -> None:
    steps = Steps()
    steps.settle(0, sampled=(1, 2, 3, 4, 5))
    steps.speculation.reset()
    assert steps.step(0) == [4]


def test_rates_start_as_expected_and_follow_what_is_seen() -> None:
    rates = AcceptanceRates((0.5, 0.9))
    assert (rates.rate(0, 0), rates.rate(0, 1)) == (0.5, 0.9)
    for _ in range(30):
        rates.record(0, 0, proposed=[1, 2, 3], sampled=[1, 2, 3, 4])
        rates.record(1, 0, proposed=[1, 2, 3], sampled=[9])
    assert rates.rate(0, 0) > 0.9
    assert rates.rate(1, 0) < 0.25
    assert 0.4 < rates.rate(2, 0) < 0.9, "a new sequence is taken to be like the others"
    assert rates.rate(0, 1) == 0.9
    rates.enter(0)
    assert rates.rate(0, 0) == rates.rate(2, 0)


def test_nothing_after_the_first_wrong_token_is_a_trial() -> None:
    rates, other = AcceptanceRates((0.5,)), AcceptanceRates((0.5,))
    rates.record(0, 0, proposed=[1, 7, 7, 7, 7], sampled=[1, 2])
    other.record(0, 0, proposed=[1, 7], sampled=[1, 2])
    assert rates.rate(0, 0) == other.rate(0, 0)


def measured(*steps: tuple[int, int], num_rows: int = 1) -> StepCosts:
    """Costs after steps of so many drafts that took so long."""
    costs = StepCosts()
    for num_drafts, duration_ns in steps:
        costs.record(num_rows=num_rows, num_drafts=num_drafts, duration_ns=duration_ns)
    return costs


def expected(costs: StepCosts, most: int, *, least: int = 0, num_rows: int = 1) -> list[float] | None:
    found = costs.expected_ns(num_rows=num_rows, least_drafts=least, most_drafts=most)
    return None if found is None else found.tolist()


def test_costs_are_known_after_three_steps_and_interruptions_count_little() -> None:
    assert expected(measured(), 2) is None
    assert expected(measured(*[(0, 1000)] * 2), 2) is None
    # Drafts have not been tried and are hoped to cost nothing.
    known = [(0, 9000), (0, 1000), (0, 1000)]
    assert expected(measured(*known), 2) == [1000, 1000, 1000]
    assert expected(measured(*known, (0, 1_000_000), (0, 2_000_000)), 0) == [1000]
    assert expected(measured(*known), 4, num_rows=2) is None, "other numbers of rows are another matter"
    assert expected(measured(*known, (3, 1300), (3, 1300)), 3, least=3) == [1000], "a first step may prepare kernels"
    assert expected(measured(*known, *[(3, 1300)] * 3), 3, least=3) == [1300]


def test_where_every_step_has_drafts_they_are_taken_for_free() -> None:
    assert expected(measured(*[(3, 1000)] * 2), 4, least=3) is None
    assert expected(measured(*[(3, 1000)] * 3), 4, least=3) == [1000, 1000]


def test_a_drafts_cost_depends_on_the_size_of_the_step() -> None:
    # Tokens: 1 | 2, 3 | 4 to 7 | 8 to 15.
    costs = measured(*[(0, 1000)] * 3, *[(1, 1100)] * 3, *[(4, 2000)] * 3)
    assert expected(costs, 7) == [1000, 1100, 1200, 1750, 2000, 2250, 2500, 2750]
    assert expected(costs, 4, least=3) == [1750, 2000]
    # Larger steps: as the nearest that is known; and whoever the rows are.
    assert expected(costs, 15, least=15) == [4750]
    for _ in range(3):
        costs.record(num_rows=3, num_drafts=0, duration_ns=3000)
    assert expected(costs, 2, num_rows=3) == [3000, 3250, 3500]
    # What was met when the machine was faster makes no draft cheaper than none.
    assert expected(measured(*[(0, 1000)] * 3, *[(4, 500)] * 3), 8) == [1000] * 9


def test_a_draft_of_a_larger_step_is_never_cheaper() -> None:
    costs = measured(*[(0, 1000)] * 3, *[(2, 2000)] * 3, *[(4, 1400)] * 3)
    assert expected(costs, 4) == [1000, 1500, 2000, 2000, 2000]


def test_between_numbers_of_rows_that_are_known_costs_lie_on_a_straight_line() -> None:
    costs = measured(*[(0, 1000)] * 3)
    for _ in range(3):
        costs.record(num_rows=5, num_drafts=0, duration_ns=3000)
    assert expected(costs, 0, num_rows=4) == [2500]
    assert expected(costs, 0, num_rows=6) is None


def test_costs_follow_a_machine_that_stays_slower() -> None:
    assert expected(measured(*[(0, 1000)] * 30, *[(0, 2000)] * 30), 0) == [2000]


def test_rows_that_were_not_met_for_long_are_not_known() -> None:
    costs = measured(*[(0, 1000)] * 3)
    for _ in range(1000):
        costs.record(num_rows=2, num_drafts=0, duration_ns=1500)
    assert expected(costs, 0) == [1000]
    costs.record(num_rows=2, num_drafts=0, duration_ns=1500)
    assert expected(costs, 0) is None


def test_what_speaks_against_drafts_is_believed_less_the_longer_none_was_met() -> None:
    costs = measured(*[(0, 1000)] * 3, *[(3, 9100)] * 16)
    assert expected(costs, 3, least=3) == [9100]
    for _ in range(200):
        costs.record(num_rows=1, num_drafts=0, duration_ns=1000)
    assert expected(costs, 3, least=3) == [5050]
    # One try corrects it: what was measured so long ago does not count beside it.
    costs.record(num_rows=1, num_drafts=0, duration_ns=1000)
    costs.record(num_rows=1, num_drafts=3, duration_ns=1300)
    assert expected(costs, 3, least=3) == [1300]


def test_drafts_that_once_were_dear_are_tried_again() -> None:
    """A neighbour took the machine while the first drafts were verified; later it is free, and they would pay."""
    steps = Steps(base_ns=0, token_ns=3000)
    assert steps.settle(0, sampled=(1, 2, 3, 4, 5)) == [0]
    steps.base_ns, steps.token_ns = 2900, 100
    found = [steps.step(0, sampled=(1, 2, 3, 4, 5)) for _ in range(1000)]
    assert found[-1] == [4]


def test_factory_gives_what_is_set_and_refuses_what_has_no_room(limits: Limits) -> None:
    def made(method: Any, number: int) -> Speculation | None:
        return make_speculation(method, max_num_drafts=number, limits=limits, now_ns=lambda: 0)

    assert made("off", 8) is None
    for method in ("ngram", "auto"):
        speculation = made(method, 8)
        assert speculation is not None and speculation.max_num_drafts == 8
    with pytest.raises(ConfigError, match=r"num_speculative_tokens is 64 and worker\.max_num_batched_tokens 64") as refused:
        made("auto", 64)
    assert refused.value.param == "worker.num_speculative_tokens"
