"""One step of one lane: budget, chunks, mixed steps, pages, preemption, and the plan as a diff."""

from __future__ import annotations

import pytest

from services.scheduler.planner import plan_step
from services.scheduler.scheduler import Scheduler
from services.scheduler.sequence import FinishReason, Status
from services.scheduler.step_plan import StepPlan, StepResult
from tests.unit.scheduler import builders
from tests.unit.scheduler.system import Site, System


def start(**capacity: int) -> tuple[System, Site]:
    """A system with one lane."""
    system = System(builders.scheduler())
    return system, system.join(builders.capacity(**capacity))


def submit(system: System, request_id: str, num_tokens: int, *, max_tokens: int | None = 8) -> None:
    """A request with a prompt of that many tokens, which no other begins with."""
    prompt = [len(system.streams)] * num_tokens
    system.submit(builders.sequence(system.core, request_id, prompt, max_tokens=max_tokens))


def step(system: System, site: Site) -> StepPlan:
    """One step of the lane; gives its plan."""
    system.deliver_result(site)
    assert system.plan_all()
    return site.plans[-1]


def test_a_long_prompt_is_spread_over_steps() -> None:
    system, site = start(max_num_batched_tokens=16)
    submit(system, "long", 40)
    plans = [step(system, site) for _ in range(4)]
    assert [plan.row_num_new_tokens for plan in plans] == [[16], [16], [8], []]
    assert [len(plan.new_sequences) for plan in plans] == [1, 0, 0, 0]
    assert plans[0].num_new_pages == [10], "pages for the whole prompt come with it"


def test_decodes_come_before_prompts_and_share_the_budget() -> None:
    system, site = start(max_num_batched_tokens=16)
    submit(system, "a", 3, max_tokens=20)
    submit(system, "b", 3, max_tokens=20)
    step(system, site)
    submit(system, "long", 40)
    plan = step(system, site)
    assert plan.row_num_new_tokens == [1, 1, 14]
    assert plan.num_tokens == 16


def test_what_the_first_prompt_leaves_goes_to_the_next() -> None:
    system, site = start(max_num_batched_tokens=16)
    for request_id in ("a", "b", "c"):
        submit(system, request_id, 10)
    assert step(system, site).row_num_new_tokens == [10, 6]
    assert step(system, site).row_num_new_tokens == [1, 4, 10]


def test_a_prompt_for_which_the_next_step_has_no_budget_waits() -> None:
    system, site = start(max_num_batched_tokens=16)
    submit(system, "a", 2)
    submit(system, "long", 29)
    assert step(system, site).row_num_new_tokens == [2, 14]
    # The decode of `a` and the rest of the long prompt are all of the next step's budget.
    submit(system, "late", 5)
    late = system.core._requests["late"]
    plan = step(system, site)
    assert plan.row_num_new_tokens == [1, 15]
    assert late.status is Status.WAITING
    plan = step(system, site)
    assert plan.row_num_new_tokens == [1, 1, 5]
    assert plan.new_sequences == [late]


def test_an_admitted_prompt_beyond_the_budget_is_told_when_it_starts() -> None:
    system, site = start(max_num_batched_tokens=16, max_num_seqs=16)
    submit(system, "a", 15)
    submit(system, "b", 15)
    assert step(system, site).row_num_new_tokens == [15, 1]
    submit(system, "c", 4)
    c = system.core._requests["c"]
    assert c.status is Status.RUNNING
    plan = step(system, site)
    assert plan.row_num_new_tokens == [1, 14, 1]
    assert plan.new_sequences == [c]


def test_the_budget_holds_whatever_has_been_admitted() -> None:
    system, site = start(max_num_batched_tokens=16)
    for name in ("a", "b", "c"):
        site.lane.admit(builders.sequence(system.core, name, [1] * 16))
    plan = plan_step(site.lane)
    assert plan is not None
    assert (plan.num_rows, plan.num_tokens) == (1, 16)


def test_a_prompt_of_one_token_is_a_row_like_a_decode() -> None:
    system, site = start()
    submit(system, "a", 1)
    plan = step(system, site)
    assert plan.row_slots == [0]
    assert not plan.row_num_new_tokens


def test_a_step_in_which_nothing_changes_says_only_that() -> None:
    system, site = start(page_size=16)
    submit(system, "a", 3)
    submit(system, "b", 3)
    plans = [step(system, site) for _ in range(4)]
    assert [plan.same_rows for plan in plans] == [False, False, True, True]
    assert plans[1].row_slots == [0, 1]
    assert plans[2] == StepPlan(step_id=plans[2].step_id, same_rows=True, num_rows=2, num_tokens=2)


def test_rows_are_named_again_when_one_has_left() -> None:
    system, site = start()
    submit(system, "a", 3, max_tokens=4)
    submit(system, "b", 3, max_tokens=20)
    plans = [step(system, site) for _ in range(6)]
    assert [plan.same_rows for plan in plans] == [False, False, True, True, False, True]
    assert plans[4].freed_slots == [0]
    assert plans[4].row_slots == [1]


def test_rows_are_named_again_after_a_plan_of_freed_slots_only() -> None:
    system, site = start()
    submit(system, "a", 3)
    for _ in range(3):
        step(system, site)
    system.core.abort(["a"], system.now_ns)
    system.deliver_result(site)
    plan = step(system, site)
    assert (plan.freed_slots, plan.num_rows) == ([0], 0)
    submit(system, "b", 1)
    assert step(system, site).row_slots == [0]
    assert not step(system, site).same_rows


def test_a_freed_slot_is_used_again_in_the_same_plan() -> None:
    system, site = start(max_num_seqs=1)
    submit(system, "a", 3)
    submit(system, "b", 3)
    step(system, site)
    system.core.abort(["a"], system.now_ns)
    plan = step(system, site)
    assert plan.freed_slots == [0]
    assert [sequence.slot for sequence in plan.new_sequences] == [0]


def test_a_sequence_aborted_before_its_first_plan_is_never_told_of() -> None:
    system, site = start()
    submit(system, "a", 3)
    system.core.abort(["a"], system.now_ns)
    assert system.core.plan(site.lane, system.now_ns) is None


def test_a_page_is_given_when_a_page_border_is_crossed() -> None:
    system, site = start(page_size=4)
    submit(system, "a", 3, max_tokens=10)
    given = [plan.num_new_pages for plan in [step(system, site) for _ in range(7)]]
    # Tokens computed: 3, 4, 5, 6, 7, 8, 9; pages hold 4 each.
    assert given == [[1], [], [1], [], [], [], [1]]


def test_among_equals_the_latest_admitted_loses_its_pages_and_finishes_later() -> None:
    system, site = start(num_pages=6, page_size=4)
    submit(system, "old", 8, max_tokens=12)
    submit(system, "new", 4, max_tokens=12)
    preempted = []
    for _ in range(12):
        preempted += step(system, site).preempted
    assert [sequence.request_id for sequence in preempted][:1] == ["new"]
    system.run()
    assert all(stream.finish is FinishReason.LENGTH and len(stream.tokens) == 12 for stream in system.streams.values())
    assert system.core.counts.num_preemptions >= 1


def test_who_has_the_fewest_outputs_loses_its_pages_first() -> None:
    system, site = start(num_pages=6, page_size=4)
    submit(system, "old", 8, max_tokens=12)
    # Moved here from another life with five output tokens.
    system.submit(builders.sequence(system.core, "new", [9] * 9, num_output_tokens=5, max_tokens=17))
    plan = step(system, site)
    while not plan.preempted:
        plan = step(system, site)
    assert [sequence.request_id for sequence in plan.preempted] == ["old"]
    system.run()
    assert all(stream.finish is FinishReason.LENGTH for stream in system.streams.values())
    system.check_accounting()


def test_a_preempted_sequence_goes_before_those_that_wait() -> None:
    system, site = start(num_pages=6, page_size=4, max_num_seqs=2)
    submit(system, "old", 8, max_tokens=12)
    submit(system, "new", 4, max_tokens=12)
    submit(system, "third", 4)
    while not step(system, site).preempted:
        system.check_accounting()
    assert [sequence.request_id for sequence in system.core.queue] == ["new", "third"]


def test_a_sequence_that_fills_the_whole_pool_ends_with_length() -> None:
    system, _ = start(num_pages=3, page_size=4)
    submit(system, "a", 5, max_tokens=None)
    system.run()
    stream = next(iter(system.streams.values()))
    assert stream.finish is FinishReason.LENGTH
    # 12 tokens have KV; the last one needs none.
    assert len(stream.tokens) == 13 - 5
    assert system.core.counts.num_preemptions == 0


def test_no_second_plan_leaves_before_the_result_of_the_first() -> None:
    system, site = start()
    submit(system, "a", 3)
    assert plan_step(site.lane) is not None
    assert plan_step(site.lane) is None


def test_counts_of_scheduled_and_computed_tokens_are_apart_while_a_step_runs() -> None:
    system, site = start()
    submit(system, "a", 3)
    step(system, site)
    step(system, site)
    sequence = next(iter(site.lane.decoding))
    assert site.lane.clock.num_scheduled(sequence) == 4
    assert site.lane.clock.num_computed(sequence) == 3


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (StepResult(0, [0], [1]), "missing"),
        (StepResult(0, [0, 1], [1]), "do not match"),
        (StepResult(0, [0, 1], [1, 50]), "vocabulary has 50"),
        (StepResult(0, [0, 1], [1, 2, 3], num_tokens=[1, 2]), "2 tokens came back"),
    ],
)
def test_an_impossible_result_ends_the_requests_it_concerns(result: StepResult, words: str) -> None:
    core: Scheduler = builders.scheduler()
    lane = core.lane_joined(1, builders.capacity(), 0)
    for request_id in ("a", "b"):
        core.submit(builders.sequence(core, request_id), 0)
    plan = core.plan(lane, 0)
    assert plan is not None
    answer = StepResult(plan.step_id, result.slots, result.token_ids, result.num_tokens)
    assert core.step_result(lane, answer, 0)
    endings = core.take_outcome().endings
    assert endings[-1].sequence.request_id == "b"
    assert endings[-1].error is not None
    assert words in endings[-1].error.message


def test_rows_for_slots_that_were_not_planned_are_counted_and_ignored() -> None:
    core = builders.scheduler()
    lane = core.lane_joined(1, builders.capacity(), 0)
    core.submit(builders.sequence(core, "a"), 0)
    plan = core.plan(lane, 0)
    assert plan is not None
    assert core.step_result(lane, StepResult(plan.step_id, [0, 5], [1, 2]), 0)
    assert core.counts.num_ignored_rows == 1
    assert not core.step_result(lane, StepResult(plan.step_id, [0], [1]), 0)
    assert core.counts.num_ignored_results == 1
    outcome = core.take_outcome()
    assert [batch.token_ids for batch in outcome.batches] == [[1]]
    assert not outcome.endings
