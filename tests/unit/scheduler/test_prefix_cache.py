"""Goal: what one sequence has computed another need not compute, and nothing wrong is ever shared.

The fake worker keeps the KV as the tokens written and reads all of it back before each token, so a wrong page fails there.
"""

from __future__ import annotations

import pytest

from services.scheduler.radix_tree import Eviction
from services.scheduler.sequence import FinishReason, Sequence
from services.scheduler.step_plan import StepResult
from tests.unit.scheduler import builders
from tests.unit.scheduler.system import Site, System


def start(eviction: Eviction | None = "lru", **capacity: int) -> tuple[System, Site]:
    """A system with one lane."""
    system = System(builders.scheduler(eviction=eviction))
    return system, system.join(builders.capacity(**capacity))


def submit(system: System, request_id: str, tokens: list[int], *, max_tokens: int = 4) -> Sequence:
    """A request with that prompt."""
    sequence = builders.sequence(system.core, request_id, tokens, max_tokens=max_tokens)
    system.submit(sequence)
    return sequence


def step(system: System, site: Site) -> None:
    """The result of the last step, and the next one."""
    system.deliver_result(site)
    assert system.plan_all()


PROMPT = list(range(40))


def test_a_finished_sequence_leaves_its_prefix_with_its_output() -> None:
    system, _ = start()
    first = submit(system, "first", PROMPT)
    system.run()
    conversation = [*first.tokens, 7, 8, 9]
    second = submit(system, "second", conversation)
    num_computed_before = system.core.counts.num_scheduled_tokens
    system.run()
    # 44 tokens are known of the first and 43 computed: 10 pages of 4.
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 40)
    assert system.core.counts.num_scheduled_tokens - num_computed_before == 47 - 40 + 3
    assert second.finish_reason is FinishReason.LENGTH
    system.check_accounting()


def test_the_last_token_is_computed_even_when_all_are_cached() -> None:
    system, _ = start()
    submit(system, "first", PROMPT)
    system.run()
    again = submit(system, "again", PROMPT)
    system.run()
    assert again.num_cached_tokens == 36
    assert system.streams[again.stream_id].tokens == again.output_from(0)


def test_a_running_sequences_prompt_is_shared() -> None:
    system, site = start(max_num_batched_tokens=64)
    long = submit(system, "long", PROMPT, max_tokens=50)
    step(system, site)
    step(system, site)
    second = submit(system, "second", [*PROMPT, 1, 2])
    assert second.pages[:10] == long.pages[:10]
    assert second.num_cached_tokens == 40
    system.check_accounting()
    system.run()
    system.check_accounting()


def test_two_that_compute_the_same_prompt_at_once_each_keep_their_own() -> None:
    system, site = start(max_num_batched_tokens=128)
    # Too little in common for one to wait for the other.
    first, second = submit(system, "first", PROMPT[:30]), submit(system, "second", PROMPT[:30])
    step(system, site)
    step(system, site)
    assert not set(first.pages) & set(second.pages)
    assert (first.num_shared_pages, second.num_shared_pages) == (7, 0)
    system.check_accounting()
    system.run()
    assert site.lane.kv.tree.num_pages == site.lane.kv.pool.num_used == 8
    system.check_accounting()


def test_an_unfinished_prompt_is_not_shared() -> None:
    system, site = start(max_num_batched_tokens=16)
    submit(system, "long", PROMPT)
    step(system, site)
    step(system, site)
    assert site.lane.kv.tree.num_pages == 0
    system.core.abort(["long"], system.now_ns)
    assert site.lane.kv.tree.num_pages == 0
    assert site.lane.kv.pool.num_used == 0


def test_a_failed_rows_own_pages_are_not_shared() -> None:
    system, site = start(max_num_batched_tokens=64)
    sequence = submit(system, "bad", PROMPT, max_tokens=50)
    for _ in range(12):
        step(system, site)
    slot, step_id = sequence.slot, site.plans[-1].step_id
    site.results.clear()
    assert system.core.step_result(site.lane, StepResult(step_id, failed_slots=[slot], failed_reasons=["nan"]), system.now_ns)
    system.collect()
    # The prompt was good; of the outputs nothing is kept.
    assert site.lane.kv.tree.num_pages == site.lane.kv.pool.num_used == 10


def test_cached_pages_make_room() -> None:
    system, site = start(num_pages=12, page_size=4)
    for index in range(6):
        submit(system, f"r{index}", [index] * 30)
        system.run()
        system.check_accounting()
    assert site.lane.kv.num_usable == 12
    assert site.lane.kv.pool.num_free < 12
    # The oldest have gone, the latest is there.
    assert submit(system, "latest", [5] * 30).num_cached_tokens == 28
    assert submit(system, "oldest", [0] * 30).num_cached_tokens == 0


def test_a_preempted_sequence_comes_back_through_the_tree() -> None:
    num_scheduled = []
    for eviction in ("lru", None):
        system, _ = start(eviction, num_pages=16, page_size=2, max_num_batched_tokens=64)
        sequences = [submit(system, f"r{index}", [index] * 8, max_tokens=16) for index in range(2)]
        system.run()
        preempted = [sequence for sequence in sequences if sequence.num_preemptions]
        assert preempted
        assert all(sequence.num_cached_tokens == 0 for sequence in preempted), "its own tokens are no saving to its client"
        num_scheduled.append(system.core.counts.num_scheduled_tokens)
        system.check_accounting()
    assert 2 * (8 + 15) < num_scheduled[0] < num_scheduled[1]


def test_without_a_cache_nothing_is_kept() -> None:
    system, site = start(eviction=None)
    for request_id in ("first", "second"):
        sequence = submit(system, request_id, PROMPT)
        system.run()
        assert sequence.num_cached_tokens == 0
    assert site.lane.kv.pool.num_used == 0


@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo"])
def test_outputs_are_the_same_with_and_without(eviction: Eviction) -> None:
    outputs = []
    for which in (eviction, None):
        system = System(builders.scheduler(eviction=which))
        system.join(builders.capacity(num_pages=24, page_size=2, max_num_batched_tokens=24))
        for index in range(12):
            submit(system, f"r{index}", [index % 3] * (10 + index % 4) + [index], max_tokens=6)
        system.run()
        outputs.append([stream.tokens for stream in system.streams.values()])
    assert outputs[0] == outputs[1]
