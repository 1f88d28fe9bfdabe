"""Choices of one request fork from one prefill: they share its pages, copy what cannot be shared, and go their own ways."""

from __future__ import annotations

from array import array

import pytest

from services.scheduler.prefill_delayer import DelayerLimits
from services.scheduler.sequence import Status
from services.scheduler.step_plan import StepPlan, StepResult
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import Site, Stream, System

PROMPT = list(range(42))
PAGE_SIZE = 4


def start(*, run_ahead: bool = True, cached: bool = True, **capacity: object) -> tuple[System, Site]:
    """A system with one lane, whose pages hold four tokens."""
    system = System(builders.scheduler(run_ahead=run_ahead, eviction="lru" if cached else None))
    return system, system.join(builders.capacity(**{"max_num_batched_tokens": 128, "num_pages": 96, **capacity}))  # type: ignore[arg-type]


def submit(
    system: System, name: str, prompt: list[int] = PROMPT, *, group: str = "g", namespace: str = "", max_tokens: int = 4
) -> Stream:
    sequence = builders.sequence(system.core, name, prompt, fork_group=group, namespace=namespace, max_tokens=max_tokens)
    system.submit(sequence)
    return system.streams[sequence.stream_id]


def expected(prompt: list[int], num_tokens: int = 4) -> array[int]:
    tokens = array("i", prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, 50))
    return tokens[len(prompt) :]


def finish(system: System, *streams: Stream, prompt: list[int] = PROMPT) -> None:
    """Let all end; each has the output it would have had alone."""
    system.run()
    system.check_accounting()
    assert system.core.num_requests == 0
    for stream in streams:
        assert stream.tokens == expected(prompt, len(stream.tokens))
        assert stream.num_ends == 1
        assert stream.error_code is None


def copies(plans: list[StepPlan]) -> list[tuple[int, int]]:
    return [pair for plan in plans for pair in zip(plan.copied_pages, plan.page_copies, strict=True)]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 20, 41, 42])
def test_a_prompt_is_computed_once_whatever_its_length(num_tokens: int, run_ahead: bool) -> None:
    prompt = PROMPT[:num_tokens]
    system, site = start(run_ahead=run_ahead)
    streams = [submit(system, f"choice {index}", prompt) for index in range(4)]
    finish(system, *streams, prompt=prompt)
    # The whole prompt once, its last token for each of the others, and three further tokens each.
    assert system.core.counts.num_scheduled_tokens == num_tokens + 3 + 4 * 3
    assert system.core.counts.num_forked == 3
    # A page is copied where the last token does not begin one, and no other.
    assert len(copies(site.plans)) == (3 if (num_tokens - 1) % PAGE_SIZE else 0)


def test_full_pages_are_shared_and_the_rest_is_its_own() -> None:
    system, site = start()
    streams = [submit(system, f"choice {index}", max_tokens=20) for index in range(4)]
    for _ in range(4):
        system.deliver_result(site)
        system.plan_all()
    sequences = [stream.sequence for stream in streams]
    assert [sequence.status for sequence in sequences] == [Status.RUNNING] * 4
    assert len({tuple(sequence.pages[:10]) for sequence in sequences}) == 1
    assert len({sequence.pages[10] for sequence in sequences}) == 4
    assert site.lane.kv.pool.num_used == 10 + sum(len(sequence.pages) - 10 for sequence in sequences)
    finish(system, *streams)


def test_choices_tell_what_was_cached_before_any_of_them() -> None:
    system, _ = start()
    system.submit(builders.sequence(system.core, "before", PROMPT[:21], max_tokens=1))
    system.run()
    streams = [submit(system, f"choice {index}") for index in range(3)]
    finish(system, *streams)
    assert [stream.sequence.num_cached_tokens for stream in streams] == [20] * 3


def test_without_a_cache_the_pages_are_copied() -> None:
    system, site = start(cached=False)
    streams = [submit(system, f"choice {index}") for index in range(3)]
    finish(system, *streams)
    assert system.core.counts.num_scheduled_tokens == 42 + 2 + 3 * 3
    assert len(copies(site.plans)) == 2 * 11
    assert site.lane.kv.pool.num_used == 0


def test_a_worker_that_copies_nothing_computes_the_last_page_anew() -> None:
    system, site = start(copies_pages=False)
    streams = [submit(system, f"choice {index}") for index in range(3)]
    finish(system, *streams)
    assert system.core.counts.num_scheduled_tokens == 42 + 2 * 2 + 3 * 3
    assert not copies(site.plans)


def test_neither_copies_nor_a_cache_holds_nobody_up() -> None:
    system, _ = start(copies_pages=False, cached=False)
    streams = [submit(system, f"choice {index}") for index in range(3)]
    system.plan_all()
    assert [stream.sequence.status for stream in streams] == [Status.RUNNING] * 3
    finish(system, *streams)


@pytest.mark.parametrize("how", ["other prompt", "other namespace", "other group", "no group"])
def test_nobody_gets_a_prompt_that_is_not_his(how: str) -> None:
    system, _ = start(cached=False)
    first = submit(system, "first")
    prompt = [*PROMPT[:-1], 7] if how == "other prompt" else PROMPT
    group = {"other group": "h", "no group": ""}.get(how, "g")
    other = submit(system, "other", prompt, group=group, namespace="salt" if how == "other namespace" else "")
    finish(system, first)
    finish(system, other, prompt=prompt)
    assert system.core.counts.num_forked == 0


def test_after_a_flush_nobody_takes_a_prompt_over() -> None:
    system, site = start(run_ahead=False)
    first, other = submit(system, "first", max_tokens=9), submit(system, "other")
    system.plan_all()
    site.lane.kv.flush()
    finish(system, first, other)
    assert system.core.counts.num_forked == 0
    assert not copies(site.plans)


def test_it_forks_where_its_source_is_though_another_lane_is_idle() -> None:
    system, _ = start()
    first = submit(system, "first")
    system.plan_all()
    idle = system.join(builders.capacity(max_num_batched_tokens=128))
    other = submit(system, "other")
    finish(system, first, other)
    assert not idle.plans
    assert system.core.counts.num_forked == 1


def test_a_full_lane_sends_it_elsewhere() -> None:
    system, _ = start(max_num_seqs=2)
    streams = [submit(system, f"choice {index}", max_tokens=20) for index in range(2)]
    system.plan_all()
    other_site = system.join(builders.capacity(max_num_batched_tokens=128))
    streams += [submit(system, f"choice {index}", max_tokens=20) for index in range(2, 4)]
    finish(system, *streams)
    assert other_site.plans
    assert system.core.counts.num_forked == 2, "one on each lane"


@pytest.mark.parametrize("end", ["abort", "lose"])
def test_a_source_that_ends_before_the_copy_is_planned_does_no_harm(end: str) -> None:
    """Goal: pages given back and taken by another are copied before that one writes them."""
    system, site = start(run_ahead=False, num_pages=24)
    first, other = submit(system, "first", max_tokens=20), submit(system, "other")
    system.plan_all()
    # The result makes the source sound; the fork enters with the next admission, and before it is planned its source goes.
    result = site.results.popleft()
    assert system.core.step_result(site.lane, result, system.now_ns)
    system.core._admit(system.now_ns)
    assert other.sequence.status is Status.RUNNING
    assert site.lane.kv._copies
    if end == "abort":
        system.core.abort(["first"], system.now_ns)
        third = submit(system, "third", [9] * 42, group="")
        system.collect()
        finish(system, third, prompt=[9] * 42)
        assert first.num_ends == 1
    else:
        system.lose(site.lane.lane_id)
        system.join(builders.capacity(max_num_batched_tokens=128))
        finish(system, first)
    finish(system, other)


def test_a_fork_that_ends_before_its_copy_is_planned_is_copied_for_no_more() -> None:
    system, site = start(run_ahead=False)
    first, other = submit(system, "first", max_tokens=20), submit(system, "other")
    system.plan_all()
    assert system.core.step_result(site.lane, site.results.popleft(), system.now_ns)
    system.core._admit(system.now_ns)
    system.core.abort(["other"], system.now_ns)
    system.collect()
    finish(system, first)
    assert not copies(site.plans)
    assert other.num_ends == 1


def test_a_source_that_fails_under_way_takes_no_fork_with_it() -> None:
    """A worker wipes the pages of a row that went wrong, perhaps before the copy that a plan on its way asks for."""
    system, site = start()
    first, other = submit(system, "first", max_tokens=20), submit(system, "other")
    system.plan_all()
    while not other.sequence.fork_source:
        system.deliver_result(site)
        system.plan_all()
    result = site.results.popleft()
    assert first.sequence.slot in result.slots
    assert other.sequence.slot not in result.slots
    rows = [(slot, token) for slot, token in zip(result.slots, result.token_ids, strict=True) if slot != first.sequence.slot]
    failed = StepResult(
        result.step_id,
        [slot for slot, _ in rows],
        [token for _, token in rows],
        failed_slots=[first.sequence.slot],
        failed_reasons=["NaN"],
    )
    num_requeued = system.core.counts.num_requeued
    assert system.core.step_result(site.lane, failed, system.now_ns)
    assert system.core.counts.num_requeued == num_requeued + 1
    assert not other.sequence.is_sound
    system.collect()
    assert first.error_code == "request_failed"
    finish(system, other)


def test_a_group_whose_first_is_aborted_forks_from_the_next() -> None:
    system, _ = start(max_num_batched_tokens=16)
    streams = [submit(system, f"choice {index}") for index in range(3)]
    system.plan_all()
    assert [stream.sequence.status for stream in streams] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    system.core.abort(["choice 0"], system.now_ns)
    system.collect()
    finish(system, *streams[1:])
    assert system.core.counts.num_forked == 1


def test_what_has_outputs_of_its_own_goes_on_with_them() -> None:
    """A scheduler died: a router submits each choice again with what it has so far."""
    system, _ = start()
    streams = []
    for index, num_former in enumerate((2, 0, 3)):
        known = [*PROMPT, *expected(PROMPT, num_former)]
        sequence = builders.sequence(system.core, f"choice {index}", known, num_output_tokens=num_former, fork_group="g")
        system.submit(sequence)
        streams.append(system.streams[sequence.stream_id])
    finish(system, *streams)
    assert all(stream.tokens == expected(PROMPT, 8) for stream in streams)


def test_a_fork_is_no_prefill_that_lanes_which_step_together_put_off() -> None:
    system = System(builders.scheduler(delayer_limits=DelayerLimits(max_delay_passes=1000)))
    for _ in range(2):
        system.join(builders.capacity(group="g", max_num_batched_tokens=128))
    # Both lanes begin a prompt in the first pass; from then on only one has something new.
    streams = [submit(system, "choice 0", max_tokens=30)]
    system.submit(builders.sequence(system.core, "on the other lane", [7] * 40, max_tokens=60))
    system.plan_all()
    streams.append(submit(system, "choice 1", max_tokens=30))
    put_off = submit(system, "put off", [8] * 40, group="")
    for _ in range(4):
        for site in system.sites.values():
            system.deliver_result(site)
        system.plan_all()
    assert put_off.sequence.status is Status.RUNNING
    assert put_off.sequence.num_output_tokens == 0
    assert streams[1].sequence.num_output_tokens > 0
    system.core.abort(["put off"], system.now_ns)
    system.collect()
    finish(system, *streams)


def test_groups_are_not_remembered_for_ever() -> None:
    system, _ = start()
    for index in range(300):
        submit(system, f"r{index}", [index % 50, index // 50, 3], group=f"g{index}", max_tokens=1)
        system.run()
    assert len(system.core._entrance._forks._members) <= 66
