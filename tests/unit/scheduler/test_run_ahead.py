"""Running ahead: the plan of a step leaves before the result of the one before it, and nobody can tell from the output."""

from __future__ import annotations

import pytest

from services.scheduler.sequence import FinishReason
from services.scheduler.step_pacer import LEAD_MIN_NS, LEAD_SHARE, StepPacer
from services.scheduler.step_plan import StepPlan, StepResult
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import Site, Stream, System


def start(**capacity: int) -> tuple[System, Site]:
    """A system with one lane that is planned ahead."""
    system = System(builders.scheduler(run_ahead=True))
    return system, system.join(builders.capacity(**capacity))


def submit(
    system: System, request_id: str, prompt: list[int], *, max_tokens: int | None = 8, stop: list[int] | None = None
) -> Stream:
    """A request that has been taken."""
    sequence = builders.sequence(system.core, request_id, prompt, max_tokens=max_tokens, stop=stop or [])
    system.submit(sequence)
    return system.streams[sequence.stream_id]


def step(system: System, site: Site) -> StepPlan | None:
    """The oldest result arrives, and what can be planned is; gives the last plan made by it, if any."""
    num_plans = len(site.plans)
    system.deliver_result(site)
    system.plan_all()
    system.check_accounting()
    return site.plans[-1] if len(site.plans) > num_plans else None


def test_two_steps_are_at_the_worker_and_no_third() -> None:
    system, site = start()
    submit(system, "a", [1, 2, 3])
    system.plan_all()
    assert [plan.num_rows for plan in site.plans] == [1, 1]
    assert len(site.lane.in_flight) == 2
    assert system.core.plan(site.lane, system.now_ns) is None
    step(system, site)
    assert len(site.plans) == 3


def test_a_sequence_whose_last_token_is_under_way_gets_no_row() -> None:
    system, site = start()
    stream = submit(system, "a", [1, 2, 3], max_tokens=3)
    system.run()
    # Three tokens, three steps: the prompt's and two of decoding. The last plan only frees the slot.
    assert [plan.num_rows for plan in site.plans] == [1, 1, 1, 0]
    assert (len(stream.tokens), stream.finish) == (3, FinishReason.LENGTH)


def test_one_output_token_is_one_step() -> None:
    system, site = start()
    stream = submit(system, "a", [1, 2, 3], max_tokens=1)
    system.run()
    assert [plan.num_rows for plan in site.plans] == [1, 0]
    assert (len(stream.tokens), stream.finish) == (1, FinishReason.LENGTH)


def test_a_stop_found_late_is_trimmed() -> None:
    prompt = builders.sequence(builders.scheduler(), "x", [1, 2, 3]).tokens
    tokens = prompt[:]
    for _ in range(3):
        tokens.append(next_token(tokens, 50))
    system, site = start()
    stream = submit(system, "a", [1, 2, 3], max_tokens=20, stop=[tokens[-1]])
    other = submit(system, "b", [4, 5, 6], max_tokens=9)
    system.run()
    assert stream.finish is FinishReason.STOP
    assert stream.tokens == tokens[3:]
    assert len(other.tokens) == 9
    # The worker computed one token more, and nobody took it for another request's.
    assert sum(plan.num_rows for plan in site.plans) == 3 + 1 + 9
    assert system.core.counts.num_ignored_rows == 0


def test_a_slot_given_out_again_gets_nothing_of_its_former_owner() -> None:
    system, site = start(max_num_seqs=1)
    first = submit(system, "first", [1, 2, 3], max_tokens=50)
    second = submit(system, "second", [7, 8, 9], max_tokens=4)
    for _ in range(4):
        step(system, site)
    assert len(site.results) == 2
    num_tokens = len(first.tokens)
    system.core.abort(["first"], system.now_ns)
    assert system.core.plan(site.lane, system.now_ns) is None
    system.collect()
    # Two results of the first are under way when the second enters its slot.
    assert second.sequence.lane is site.lane
    system.run()
    assert len(first.tokens) == num_tokens
    tokens = second.sequence.tokens[:3]
    for _ in range(4):
        tokens.append(next_token(tokens, 50))
    assert second.tokens == tokens[3:]


def test_a_plan_that_would_have_to_preempt_waits_for_the_result() -> None:
    system, _ = start(num_pages=4, page_size=4, max_num_seqs=2)
    # Each has two pages; one ends just when the other would need a third.
    submit(system, "ends", [1] * 5, max_tokens=4)
    goes_on = submit(system, "goes on", [2] * 5, max_tokens=9)
    system.run()
    assert system.core.counts.num_preemptions == 0
    assert len(goes_on.tokens) == 9


@pytest.mark.parametrize("run_ahead", [False, True])
def test_preemption_still_comes_when_nothing_is_under_way(run_ahead: bool) -> None:
    system = System(builders.scheduler(run_ahead=run_ahead))
    system.join(builders.capacity(num_pages=6, page_size=4, max_num_seqs=4))
    streams = [submit(system, f"r{index}", [index] * 5, max_tokens=12) for index in range(4)]
    system.run()
    assert system.core.counts.num_preemptions > 0
    for stream in streams:
        tokens = stream.sequence.tokens[:5]
        for _ in range(12):
            tokens.append(next_token(tokens, 50))
        assert stream.tokens == tokens[5:]


def test_a_row_that_fails_while_the_next_step_is_under_way() -> None:
    system, site = start()
    bad = submit(system, "bad", [1, 2, 3], max_tokens=50)
    good = submit(system, "good", [4, 5, 6], max_tokens=6)
    for _ in range(3):
        step(system, site)
    slot = bad.sequence.slot
    # The worker fails the row, and knows the slot no more in the step that it has got already.
    for index, result in enumerate(list(site.results)):
        place = result.slots.index(slot)
        kept = [(s, t) for s, t in zip(result.slots, result.token_ids, strict=True) if s != slot]
        site.results[index] = StepResult(
            result.step_id,
            [s for s, _ in kept],
            [t for _, t in kept],
            failed_slots=[slot] if index == 0 else [],
            failed_reasons=["nan"] if index == 0 else [],
            unknown_slots=[] if index == 0 else [slot],
        )
        assert place >= 0
    system.run()
    assert bad.error_code == "request_failed"
    assert bad.num_ends == 1
    assert len(good.tokens) == 6
    assert system.core.counts.num_requeued == 0


def test_results_out_of_order_are_ignored() -> None:
    system, site = start()
    submit(system, "a", [1, 2, 3])
    system.plan_all()
    assert not system.core.step_result(site.lane, site.results[1], system.now_ns)
    assert system.core.counts.num_ignored_results == 1
    system.run()
    assert system.core.num_requests == 0


def pacer(*steps: tuple[int, int]) -> StepPacer:
    """One that has seen these steps: extra tokens and nanoseconds."""
    found = StepPacer()
    for num_extra_tokens, duration_ns in steps:
        found.on_plan(num_extra_tokens, 0)
        found.on_result(duration_ns, duration_ns)
    return found


def leave_after_ns(known: StepPacer, num_extra_tokens: int) -> int:
    """How long after the begin of such a step the next plan leaves."""
    known.on_plan(num_extra_tokens, 1000)
    after_ns = known.next_plan_in_ns(1000)
    assert known.next_plan_in_ns(1500) == after_ns - 500
    assert known.on_result(0, 3000) == 2000
    return after_ns


def test_the_next_plan_leaves_late_and_early_enough() -> None:
    assert pacer().next_plan_in_ns(5) == 0, "nothing is at the worker"
    assert leave_after_ns(pacer(), 0) < 0, "nothing is known"
    known = pacer(*[(0, 40_000_000)] * 50, *[(100, 140_000_000)] * 50)
    assert leave_after_ns(known, 0) == 40_000_000 * (1 - LEAD_SHARE)
    assert leave_after_ns(known, 100) == pytest.approx(140_000_000 * (1 - LEAD_SHARE))
    assert leave_after_ns(known, 200) == pytest.approx(240_000_000 * (1 - LEAD_SHARE))
    # A pause of the machine does not teach it to wait for long.
    assert leave_after_ns(pacer(*[(0, 40_000_000)] * 50, (0, 10_000_000_000)), 0) < 60_000_000
    assert leave_after_ns(pacer((0, LEAD_MIN_NS)), 0) == 0


def test_the_second_of_two_steps_begins_with_the_result_of_the_first() -> None:
    known = pacer(*[(0, 40_000_000)] * 50)
    known.on_plan(0, 0)
    known.on_plan(0, 10)
    assert known.num_under_way == 2
    assert known.on_result(40_000_000, 41_000_000) == 41_000_000
    assert known.next_plan_in_ns(41_000_000) == 30_000_000
