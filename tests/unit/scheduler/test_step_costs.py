"""What steps cost: learning it, and how much of the prompts a step with decodes takes by it."""

from __future__ import annotations

import random

import pytest

from services.scheduler.planner import plan_step
from services.scheduler.step_costs import PromptShare, StepCosts
from services.scheduler.step_plan import StepPlan
from tests.unit.scheduler import builders
from tests.unit.scheduler.system import System

MS = 1_000_000
PAGE = 32
BUDGET = 512


def decode_ns(num_decodes: int) -> int:
    """What a step of decodes takes on this machine."""
    return 2 * MS + num_decodes * MS // 4


def prompt_ns(num_tokens: int, depth: int) -> int:
    """What prompt tokens add."""
    return num_tokens * (200_000 + 100 * depth)


def share_of(costs: StepCosts, num_decodes: int, num_tokens: int, depth: int = 0) -> PromptShare:
    """The share of prompts of a step to which one prompt brings that many tokens."""
    share = PromptShare(costs, num_decodes, PAGE)
    share.take(num_tokens, depth)
    return share


def taught(target_ns: int = 50 * MS, *, depths: range = range(0, 8192, 256)) -> StepCosts:
    """Costs that have seen steps of that machine, with prompts' chunks at these depths."""
    costs = StepCosts(target_ns)
    for _ in range(3):
        for num_decodes in (1, 4, 16):
            costs.record_decodes(num_decodes, decode_ns(num_decodes))
    for _ in range(3):
        for depth in depths:
            costs.record_share(share_of(StepCosts(), 4, BUDGET, depth), 0, decode_ns(4) + prompt_ns(BUDGET, depth))
    return costs


def test_a_linear_cost_is_learnt() -> None:
    costs = taught()
    for num_decodes in (1, 4, 10, 16):
        assert costs.decode_ns(num_decodes) == pytest.approx(decode_ns(num_decodes))
    for depth in (0, 1024, 4096):
        assert costs.token_ns(depth) == pytest.approx(prompt_ns(1, depth))
    assert costs.prompt_ns(4) == pytest.approx(50 * MS - decode_ns(4))


def test_what_is_not_known_is_that_of_the_nearest_that_is() -> None:
    costs = taught(depths=range(1024, 3072, 1024))
    assert costs.token_ns(0) == costs.token_ns(1024) < costs.token_ns(2048) == costs.token_ns(100_000)
    # No step has had more decodes than 16.
    assert costs.decode_ns(64) == costs.decode_ns(16)
    assert costs.decode_ns(100_000) == costs.decode_ns(16)


def test_nothing_is_limited_before_enough_was_measured() -> None:
    costs = StepCosts(50 * MS)
    for _ in range(2):
        costs.record_share(share_of(costs, 4, BUDGET), 0, 150 * MS)
        assert costs.prompt_ns(4) is None
        assert share_of(costs, 4, BUDGET).num_tokens == BUDGET
    costs.record_share(share_of(costs, 4, BUDGET), 0, 150 * MS)
    share = share_of(costs, 4, BUDGET)
    assert share.is_limited
    assert share.num_tokens < BUDGET


def test_pauses_of_the_machine_do_not_move_it() -> None:
    costs = taught()
    was = costs.token_ns(0), costs.decode_ns(4)
    for index in range(64):
        pause_ns = 500 * MS if index % 2 else 0
        costs.record_share(share_of(costs, 4, 192), 0, decode_ns(4) + prompt_ns(192, 0) + pause_ns)
        costs.record_decodes(4, decode_ns(4) + pause_ns)
        assert (costs.token_ns(0), costs.decode_ns(4)) == pytest.approx(was)


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    costs = taught()
    before = share_of(costs, 4, BUDGET).num_tokens
    for _ in range(16):
        share = share_of(costs, 4, BUDGET)
        costs.record_share(share, 0, decode_ns(4) + 3 * prompt_ns(share.num_tokens, 0))
    assert costs.token_ns(0) == pytest.approx(3 * prompt_ns(1, 0))
    assert share_of(costs, 4, BUDGET).num_tokens < before


def test_times_without_prompts_are_forgotten_where_no_such_step_comes() -> None:
    costs = taught()
    for _ in range(1001):
        costs.record_share(share_of(costs, 4, 192), 0, 45 * MS)
    assert costs.decode_ns(4) == 0
    # All is counted to the prompt's tokens then, and comes to the same time.
    assert costs.token_ns(0) * 192 == pytest.approx(45 * MS)


def test_drafts_are_decoded_tokens() -> None:
    costs = taught()
    costs.record_decodes(16, 1 * MS)
    assert costs.decode_ns(4) == pytest.approx(decode_ns(4))
    # As many as sixteen rows have.
    for _ in range(16):
        share = share_of(costs, 4, BUDGET)
        costs.record_share(share, 12, decode_ns(16) + prompt_ns(share.num_tokens, 0))
    assert costs.token_ns(0) == pytest.approx(prompt_ns(1, 0))


def test_what_is_no_measurement_teaches_nothing() -> None:
    costs = StepCosts(50 * MS)
    for _ in range(3):
        # A time that is not known, no decodes beside it, a piece of a page.
        costs.record_share(share_of(costs, 4, BUDGET), 0, 0)
        costs.record_share(share_of(costs, 0, BUDGET), 0, 200 * MS)
        costs.record_share(share_of(costs, 4, PAGE - 1), 0, 200 * MS)
        costs.record_decodes(4, 0)
    assert costs.prompt_ns(4) is None
    assert costs.decode_ns(4) == 0


@pytest.mark.parametrize("fixed_ns", [0, 10 * MS])
@pytest.mark.parametrize("depth", [0, 3000])
def test_steps_come_to_the_target_whatever_a_step_costs_beside_its_tokens(fixed_ns: int, depth: int) -> None:
    costs = StepCosts(50 * MS)
    rng = random.Random(7)
    times_ns = []
    for _ in range(60):
        costs.record_decodes(4, decode_ns(4))
        share = share_of(costs, 4, BUDGET, depth)
        times_ns.append(decode_ns(4) + fixed_ns + prompt_ns(share.num_tokens, depth))
        costs.record_share(share, 0, times_ns[-1] + (rng.randrange(200 * MS) if rng.random() < 0.3 else 0))
    page_ns = prompt_ns(PAGE, depth)
    # Where it has learnt: at most the target, and no page more would fit. A pause may cost one more page for a while.
    assert max(times_ns[20:]) <= 50 * MS
    assert min(times_ns[20:]) >= 50 * MS - 2 * page_ns


def test_a_step_without_decodes_and_one_without_a_target_take_all() -> None:
    assert share_of(taught(), 0, 8192).num_tokens == 8192
    assert share_of(taught(0), 4, 8192).num_tokens == 8192
    assert not share_of(taught(), 0, 8192).is_limited


def test_a_prompt_gets_whole_pages_or_all_it_has_left() -> None:
    costs = taught()
    # 47 ms at 0.2 ms a token.
    assert share_of(costs, 4, BUDGET).num_tokens == 224
    assert share_of(costs, 4, 230).num_tokens == 230
    assert share_of(costs, 4, 250).num_tokens == 224


def test_the_time_that_one_prompt_leaves_goes_to_the_next() -> None:
    share = PromptShare(taught(), 4, PAGE)
    assert share.take(100, 0) == 100
    assert not share.is_limited
    # 27 ms are left, at 0.5 ms a token.
    assert share.take(200, 3072) == 32
    assert share.is_limited
    assert share.take(200, 0) == 32
    assert share.take(200, 0) == 0
    assert share.num_tokens == 164
    assert share.depth == 32 * 3072 // 164


def test_a_prompt_always_goes_on_by_a_page() -> None:
    costs = taught(1 * MS)
    # One decode takes longer than the target: the prompt gets as long as that, which is 2.25 ms and less than a page's time.
    assert share_of(costs, 1, BUDGET).num_tokens == PAGE
    assert share_of(costs, 1, 5).num_tokens == 5
    share = PromptShare(costs, 1, PAGE)
    assert [share.take(BUDGET, 0), share.take(BUDGET, 0)] == [PAGE, 0]
    share = PromptShare(costs, 1, PAGE)
    assert [share.take(5, 0), share.take(BUDGET, 0), share.take(5, 0)] == [5, PAGE - 5, 0]


def test_prompts_get_as_long_as_the_decodes_where_these_fill_the_target() -> None:
    costs = taught(5 * MS)
    for _ in range(3):
        costs.record_decodes(64, 40 * MS)
    # 40 ms at 0.2 ms a token.
    assert share_of(costs, 64, BUDGET).num_tokens == 192


class Lane:
    """A system of one lane whose worker takes the time of this machine."""

    def __init__(self, target_ns: int, *, budget: int = BUDGET) -> None:
        self.system = System(builders.scheduler(mixed_step_target_ns=target_ns))
        self.site = self.system.join(
            builders.capacity(num_pages=512, page_size=PAGE, max_num_batched_tokens=budget, max_model_len=8192, max_num_seqs=16)
        )
        self.times_ns: list[int] = []

    def submit(self, request_id: str, num_tokens: int, *, max_tokens: int = 1000) -> None:
        """A request that shares nothing with others."""
        prompt = [len(self.system.streams)] * num_tokens
        self.system.submit(builders.sequence(self.system.core, request_id, prompt, max_tokens=max_tokens))

    def step(self) -> StepPlan:
        """One step; gives its plan."""
        assert self.system.plan_all()
        step = self.site.lane.in_flight[self.site.plans[-1].step_id]
        num_prompt_tokens, depth = (step.share.num_tokens, step.share.depth) if step.share else (0, 0)
        self.times_ns.append(decode_ns(step.num_tokens - num_prompt_tokens) + prompt_ns(num_prompt_tokens, depth))
        self.system.deliver_result(self.site, duration_ns=self.times_ns[-1])
        return self.site.plans[-1]


def run_with_long_prompt(target_ns: int) -> Lane:
    """Four sequences decode while prompts of 4,000 tokens come."""
    lane = Lane(target_ns)
    for index in range(4):
        lane.submit(f"s{index}", 20)
    for _ in range(10):
        lane.step()
    for turn in range(3):
        lane.submit(f"long{turn}", 4000, max_tokens=1)
        lane.times_ns.clear()
        while lane.site.lane.prefilling:
            lane.step()
    return lane


def test_a_long_prompt_does_not_keep_those_that_decode_waiting() -> None:
    without, limited = run_with_long_prompt(0), run_with_long_prompt(30 * MS)
    assert max(without.times_ns) > 150 * MS
    # What stands before a chunk is known to 256 tokens, and half that is 6 % of what it costs.
    assert max(limited.times_ns) <= 1.1 * 30 * MS
    counts = limited.system.core.counts
    assert counts.num_limited_steps > 0
    assert counts.num_limited_tokens <= counts.num_limited_steps * 160
    assert without.system.core.counts.num_limited_steps == 0


def test_the_first_prompts_with_nothing_decoding_take_the_whole_budget() -> None:
    lane = run_with_long_prompt(30 * MS)
    lane.system.core.abort([f"s{index}" for index in range(4)], 0)
    lane.system.plan_all()
    assert not lane.site.lane.has_work
    lane.submit("alone", 2000)
    plans = [lane.step() for _ in range(4)]
    assert [plan.num_tokens for plan in plans] == [512, 512, 512, 464]


def test_the_same_results_in_the_same_order_give_the_same_plans() -> None:
    first, second = run_with_long_prompt(30 * MS), run_with_long_prompt(30 * MS)
    assert [plan.row_num_new_tokens for plan in first.site.plans] == [plan.row_num_new_tokens for plan in second.site.plans]


def test_a_limited_prompt_stays_within_the_budget() -> None:
    lane = Lane(1 * MS, budget=16)
    for index in range(4):
        lane.submit(f"s{index}", 4)
    for _ in range(4):
        lane.step()
    lane.submit("long", 200)
    plans = [lane.step() for _ in range(12)]
    # A page is more than the budget has left.
    assert {plan.num_tokens for plan in plans} == {16}
    lane.system.deliver_result(lane.site)
    assert plan_step(lane.site.lane) is not None
