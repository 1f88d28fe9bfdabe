"""The small owners: page pool, slots, decode clock, queue, drain rate, deadlines, lanes."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from headrace.errors import OverloadedError
from headrace.v1 import common_pb2 as common
from services.scheduler.deadlines import BestSpeed, Deadlines
from services.scheduler.decode_clock import DecodeClock
from services.scheduler.drain_rate import DrainRate
from services.scheduler.lane import Lane, LaneCapacity
from services.scheduler.lanes import Lanes
from services.scheduler.page_pool import PagePool
from services.scheduler.policies.fcfs import FirstComeFirstServed
from services.scheduler.radix_tree import NO_MATCH
from services.scheduler.sequence import FinishReason
from services.scheduler.slot_table import SlotTable
from services.scheduler.waiting_queue import WaitingQueue
from tests.unit.scheduler import builders
from tests.unit.scheduler.system import System

S = 1_000_000_000


def test_finish_reasons_have_the_numbers_of_the_wire() -> None:
    names = {f"FINISH_REASON_{reason.name}": int(reason) for reason in FinishReason if reason}
    assert names == {name: number for name, number in common.FinishReason.items() if number}


def test_pages_are_all_or_nothing_and_come_back() -> None:
    pool = PagePool(4, 16)
    first = pool.allocate(3)
    assert first is not None
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_used) == (1, 3)
    pool.free(first)
    again = pool.allocate(4)
    assert again is not None
    assert sorted(again) == [0, 1, 2, 3]
    assert pool.allocate(0) == []


def test_freeing_a_page_twice_is_caught() -> None:
    pool = PagePool(2, 1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for_tokens_round_up(num_tokens: int, num_pages: int) -> None:
    assert PagePool(9, 16).pages_for(num_tokens) == num_pages


@pytest.mark.parametrize(
    "name", ["max_model_len", "vocab_size", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens"]
)
def test_a_capacity_of_zero_is_refused(name: str) -> None:
    sizes = dict.fromkeys(["max_model_len", "vocab_size", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens"], 8)
    with pytest.raises(ValueError, match=name):
        LaneCapacity(model="m", **(sizes | {name: 0}))


def test_only_slots_the_worker_knows_are_told_as_freed() -> None:
    slots = SlotTable(2)
    slots.free(slots.allocate(), is_announced=False)
    assert not slots.has_freed
    slot = slots.allocate()
    slots.free(slot, is_announced=True)
    assert slots.take_freed() == [slot]
    assert slots.take_freed() == []
    assert slots.num_free == 2


def test_a_sequence_that_left_the_clock_is_due_for_nothing() -> None:
    core = builders.scheduler()
    clock = DecodeClock()
    clock.tick = 5
    leaver, stayer = builders.sequence(core, "a"), builders.sequence(core, "b")
    for sequence in (leaver, stayer):
        clock.enter(sequence, page_tokens=4, token_limit=6)
    clock.leave(leaver)
    # 3 tokens are scheduled at tick 5 and pages hold 4: the second tick from here needs a page.
    clock.tick = 7
    assert clock.take_page_due() == [stayer]
    # The results of ticks 5, 6 and 7 bring tokens 4, 5 and 6.
    assert clock.take_limit_due(7) == [stayer]
    assert not clock._page_due
    assert not clock._limit_due


def queue(**bounds: int) -> WaitingQueue:
    return WaitingQueue(FirstComeFirstServed(), max_requests=bounds.get("max_requests", 9), max_tokens=bounds.get("max_tokens", 99))


def test_those_that_have_run_go_first_then_the_order_of_arrival() -> None:
    core, waiting = builders.scheduler(), queue()
    sequences = {name: builders.sequence(core, name) for name in "abcd"}
    waiting.add(sequences["a"])
    waiting.add(sequences["b"])
    waiting.take_back(sequences["c"])
    waiting.take_back(sequences["d"])
    order = []
    while (head := waiting.peek()) is not None:
        order.append(head.request_id)
        waiting.remove(head, 0)
    assert order == ["d", "c", "a", "b"]
    assert waiting.num_tokens == 0


def test_a_refusal_names_bound_value_and_time() -> None:
    core, waiting = builders.scheduler(), queue(max_requests=2, max_tokens=10)
    waiting.check_room(1000, 0)
    for name in "ab":
        waiting.add(builders.sequence(core, name, [1, 2, 3]))
    with pytest.raises(OverloadedError, match="2 requests wait and max_waiting_requests is 2") as refusal:
        waiting.check_room(1, 0)
    assert refusal.value.retry_after_s >= 1
    waiting.max_requests = 3
    with pytest.raises(OverloadedError, match="6 tokens wait, this request has 5 and max_waiting_tokens is 10"):
        waiting.check_room(5, 0)
    waiting.check_room(4, 0)


def test_the_time_to_come_back_follows_from_all_that_left_whatever_they_waited_for() -> None:
    """One a second leaves, half of them after they were set aside for a sibling; ones that have run before do not count."""
    core, waiting = builders.scheduler(), queue(max_requests=1)
    sibling = builders.sequence(core, "sibling")
    sibling.is_sound = True
    for second in range(60):
        one = builders.sequence(core, f"r{second}")
        waiting.add(one)
        if second % 2:
            waiting.hold(one, sibling)
            waiting.take_up_held()
        waiting.remove(one, second * S)
        former = builders.sequence(core, f"former {second}")
        former.num_admissions = 1
        waiting.take_back(former)
        waiting.remove(former, second * S)
    for name in "abcde":
        waiting.add(builders.sequence(core, name))
    with pytest.raises(OverloadedError) as refusal:
        waiting.check_room(1, 60 * S)
    # Five wait and one may: five have to leave.
    assert refusal.value.retry_after_s == pytest.approx(5, rel=0.1)


def test_the_drain_rate_finds_a_steady_rate() -> None:
    rate = DrainRate(window_s=10)
    for tenth in range(300):
        rate.record(2, tenth * S // 10)
    assert rate.per_second(30 * S) == pytest.approx(20, rel=0.05)
    assert rate.seconds_for(100, 30 * S) == pytest.approx(5, rel=0.05)


def test_advice_stays_within_bounds_and_survives_a_clock_that_jumps_back() -> None:
    rate = DrainRate(retry_after_s_min=1, retry_after_s_max=60)
    assert rate.seconds_for(1, 0) == 60
    for second in range(10):
        rate.record(1000, second * S)
    assert rate.seconds_for(1, 10 * S) == 1
    assert 1 <= rate.seconds_for(10**9, 1) <= 60


def test_deadlines_come_in_order_and_forget_the_ended() -> None:
    deadlines = Deadlines()
    live = {"a", "b", "c"}
    for request_id, deadline_ns in (("b", 20), ("a", 10), ("c", 30)):
        deadlines.add(request_id, deadline_ns, live, 3)
    assert deadlines.take_due(20) == ["a", "b"]
    assert deadlines.next_ns(live) == 30
    assert deadlines.next_ns({"a"}) is None


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for index in range(10_000):
        deadlines.add(str(index), 10**9 + index, {str(index)}, 1)
    assert len(deadlines._heap) < 100


def test_the_lane_with_the_least_load_takes_a_sequence() -> None:
    core, lanes = builders.scheduler(), Lanes()
    for lane_id in (1, 2):
        lanes.add(Lane(lane_id, builders.capacity()))
    first, second = lanes
    first.admit(builders.sequence(core, "a", [1] * 9))
    second.admit(builders.sequence(core, "b", [1] * 3))
    assert lanes.choose(builders.sequence(core, "c"), Lane.can_admit) == (second, NO_MATCH)
    second.is_draining = True
    assert lanes.choose(builders.sequence(core, "d"), Lane.can_admit) == (first, NO_MATCH)


def test_a_cached_prefix_outweighs_as_much_load() -> None:
    core, lanes = builders.scheduler(), Lanes()
    for lane_id in (1, 2):
        lanes.add(Lane(lane_id, builders.capacity(page_size=4)))
    first, second = lanes
    first.admit(builders.sequence(core, "a", [1] * 7))
    first.kv.tree.insert(array("i", range(8)).tobytes(), first.kv.allocate(2) or [])
    chosen = lanes.choose(builders.sequence(core, "b", range(12)), Lane.can_admit)
    assert chosen is not None
    lane, match = chosen
    assert lane is first
    assert match.num_pages == 2
    first.admit(builders.sequence(core, "c", [1] * 2))
    chosen = lanes.choose(builders.sequence(core, "d", range(12)), Lane.can_admit)
    assert chosen is not None
    assert chosen[0] is second


def test_a_lane_keeps_a_page_for_each_running_sequence() -> None:
    core = builders.scheduler()
    lane = Lane(1, builders.capacity(num_pages=4, page_size=4))
    lane.admit(builders.sequence(core, "a", [1] * 8))
    assert not lane.can_admit(builders.sequence(core, "b", [1] * 5), NO_MATCH), "2 pages are free, 2 needed, and 1 must be left"
    assert lane.can_admit(builders.sequence(core, "c", [1] * 4), NO_MATCH)


def test_no_more_sequences_run_than_the_budget_has_tokens() -> None:
    assert Lane(1, builders.capacity(max_num_seqs=8, max_num_batched_tokens=3)).slots.num_slots == 3


def test_a_request_takes_at_least_what_the_fastest_steps_took() -> None:
    speed = BestSpeed()
    assert speed.least_ns(1000, 5) == 0
    speed.record(100, 50_000)
    speed.record(1, 10_000)
    speed.record(0, 1)
    speed.record(5, 0)
    # 500 ns a token, 10 µs a step.
    assert speed.least_ns(1000, 1) == 500_000
    assert speed.least_ns(4, 1) == 10_000
    assert speed.least_ns(1000, 5) == 500_000 + 4 * 10_000


def test_a_deadline_that_cannot_be_met_is_dropped_before_its_prefill() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity(max_num_seqs=1, max_num_batched_tokens=8))
    system.submit(builders.sequence(system.core, "runs", [1] * 8, max_tokens=2))
    for _ in range(2):
        system.plan_all()
        result = replace(site.results.popleft(), duration_ns=80_000_000)
        system.now_ns += 80_000_000
        assert system.core.step_result(site.lane, result, system.now_ns)
        system.collect()
    # 8 tokens in 80 ms: 40 tokens take 400 ms at least.
    lost = builders.sequence(system.core, "lost", [2] * 40, deadline_ns=system.now_ns + 399_000_000)
    system.submit(lost)
    assert system.streams[lost.stream_id].error_code == "deadline_exceeded"
    assert lost.num_admissions == 0
    met = builders.sequence(system.core, "met", [3] * 40, deadline_ns=system.now_ns + 401_000_000)
    system.submit(met)
    assert met.lane is site.lane
    system.core.abort(["met"], system.now_ns)
    # What is cached need not be computed.
    system.submit(builders.sequence(system.core, "first", [4] * 40, max_tokens=1))
    system.run()
    again = builders.sequence(system.core, "again", [4] * 40, deadline_ns=system.now_ns + 100_000_000)
    system.submit(again)
    assert again.lane is site.lane
