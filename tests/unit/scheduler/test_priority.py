"""Priority classes: order, promotion by waiting, and preemption of lower classes."""

from __future__ import annotations

from array import array

import pytest

from headrace.errors import InvalidRequestError
from headrace.v1 import scheduler_pb2 as scheduler
from services.scheduler import messages
from services.scheduler.config import Settings
from services.scheduler.policies.priority import PROMOTE_AFTER_S
from services.scheduler.sequence import Status
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import Stream, System

SECOND = 1_000_000_000


def start(**capacity: int) -> System:
    """A system that goes by priority, with one lane."""
    system = System(builders.scheduler(policy="priority", run_ahead=True))
    system.join(builders.capacity(**capacity))
    return system


def submit(system: System, request_id: str, priority: int, *, num_tokens: int = 5, max_tokens: int = 8) -> Stream:
    """A request that has been taken."""
    sequence = builders.sequence(system.core, request_id, [len(system.streams)] * num_tokens, max_tokens=max_tokens)
    sequence.priority = priority
    system.submit(sequence)
    return system.streams[sequence.stream_id]


def waiting_order(system: System) -> list[str]:
    """Names of those that wait, the next one first; they are taken out."""
    names = []
    while (sequence := system.core.queue.peek()) is not None:
        names.append(sequence.request_id)
        system.core.queue.remove(sequence, system.now_ns)
    return names


def test_higher_classes_first_then_arrival() -> None:
    system = start(max_num_seqs=1)
    submit(system, "runs", 100)
    for name, priority in (("a", 0), ("b", 5), ("c", -5), ("d", 5), ("e", 0)):
        system.now_ns += 1
        submit(system, name, priority)
    assert waiting_order(system) == ["b", "d", "a", "e", "c"]


def test_waiting_promotes() -> None:
    system = start(max_num_seqs=1)
    submit(system, "runs", 100)
    submit(system, "old", 0)
    system.now_ns += int(3.5 * PROMOTE_AFTER_S * SECOND)
    submit(system, "three above", 3)
    submit(system, "four above", 4)
    assert waiting_order(system) == ["four above", "old", "three above"]


def expected(stream: Stream, num_prompt_tokens: int = 5, num_tokens: int = 8) -> array[int]:
    tokens = stream.sequence.tokens[:num_prompt_tokens]
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, 50))
    return tokens[num_prompt_tokens:]


@pytest.mark.parametrize("shortage", [{"max_num_seqs": 2}, {"num_pages": 8, "page_size": 2}])
def test_lower_classes_make_room_the_lowest_and_latest_first(shortage: dict[str, int]) -> None:
    system = start(**shortage)
    low = submit(system, "low", 0)
    lower = submit(system, "lower", -3)
    for _ in range(3):
        system.plan_all()
        for site in system.sites.values():
            system.deliver_result(site)
    assert low.sequence.status is lower.sequence.status is Status.RUNNING
    # Ten above `lower`, not above `low`.
    high = submit(system, "high", 8)
    system.plan_all()
    system.check_accounting()
    assert high.sequence.status is Status.RUNNING
    assert (low.sequence.num_preemptions, lower.sequence.num_preemptions) == (0, 1)
    assert lower.sequence.status is Status.WAITING
    system.run()
    assert low.tokens == expected(low)
    assert lower.tokens == expected(lower)
    assert high.tokens == expected(high)
    # Where pages are few others may be preempted again, the most important never.
    assert high.sequence.num_preemptions == 0


def test_a_class_too_near_waits() -> None:
    system = start(max_num_seqs=1)
    first = submit(system, "first", 0)
    submit(system, "near", 9)
    system.run()
    assert first.sequence.num_preemptions == 0


def test_who_was_promoted_by_waiting_is_not_preempted_again() -> None:
    system = start(max_num_seqs=1)
    submit(system, "runs", 100, max_tokens=2)
    old = submit(system, "old", 0, max_tokens=20)
    system.now_ns += int(20 * PROMOTE_AFTER_S * SECOND)
    for _ in range(6):
        system.plan_all()
        for site in system.sites.values():
            system.deliver_result(site)
    assert old.sequence.status is Status.RUNNING
    submit(system, "new", 25)
    assert old.sequence.status is Status.RUNNING
    system.run()
    assert old.sequence.num_preemptions == 0


def test_nobody_leaves_when_it_would_not_help() -> None:
    system = start(num_pages=8, page_size=4, max_num_seqs=4, max_num_batched_tokens=64)
    small = submit(system, "small", 0, num_tokens=3, max_tokens=30)
    same = submit(system, "same", 50, num_tokens=20, max_tokens=12)
    system.plan_all()
    assert same.sequence.status is Status.RUNNING
    submit(system, "big", 55, num_tokens=28)
    system.plan_all()
    assert small.sequence.num_preemptions == 0
    system.run()
    assert system.core.num_requests == 0


def test_a_priority_out_of_range_or_without_effect_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="priority must be between -100 and 100, got 101"):
        messages.check_priority(scheduler.Submit(priority=101), is_ordered=True)
    with pytest.raises(InvalidRequestError, match=r"priority is 5 .* scheduler\.policy"):
        messages.check_priority(scheduler.Submit(priority=5), is_ordered=False)
    messages.check_priority(scheduler.Submit(priority=-100), is_ordered=True)
    messages.check_priority(scheduler.Submit(), is_ordered=False)


@pytest.mark.parametrize("threshold", [0, -1, 201])
def test_a_threshold_out_of_range_is_refused_at_start(threshold: int) -> None:
    with pytest.raises(ValueError, match="priority_preemption_threshold"):
        Settings(priority_preemption_threshold=threshold)
