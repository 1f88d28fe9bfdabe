"""Who enters a lane: prompts are not computed twice at the same time, and pages are expected to last."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from services.scheduler.future_need import is_future_sound, peak_pages
from services.scheduler.output_lengths import HISTORY_MIN, PRIOR_SHARE, PRIOR_TOKENS_MAX, OutputLengths
from services.scheduler.radix_tree import NO_MATCH
from services.scheduler.sequence import Status
from services.scheduler.step_plan import StepResult
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import Site, Stream, System

PROMPT = list(range(40))


def start(*, policy: str = "fcfs", run_ahead: bool = True, cached: bool = True, **capacity: int) -> tuple[System, Site]:
    """A system with one lane."""
    system = System(builders.scheduler(policy=policy, run_ahead=run_ahead, eviction="lru" if cached else None))
    return system, system.join(builders.capacity(**{"max_num_batched_tokens": 128, **capacity}))


def submit(system: System, name: str, prompt: list[int], *, max_tokens: int = 4, deadline_ns: int = 0) -> Stream:
    """A request that has been taken."""
    sequence = builders.sequence(system.core, name, prompt, max_tokens=max_tokens, deadline_ns=deadline_ns)
    system.submit(sequence)
    return system.streams[sequence.stream_id]


def expected(prompt: list[int], num_tokens: int = 4) -> array[int]:
    tokens = array("i", prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, 50))
    return tokens[len(prompt) :]


def finish(system: System, *streams: tuple[Stream, list[int]]) -> None:
    """Let all end, with the output each would have had alone."""
    system.run()
    system.check_accounting()
    assert system.core.num_requests == 0
    for stream, prompt in streams:
        assert stream.tokens == expected(prompt)


@pytest.mark.parametrize("policy", ["fcfs", "fair", "priority", "lpm"])
def test_samples_of_one_prompt_fork_from_one_prefill(policy: str) -> None:
    system, _ = start(policy=policy)
    streams = [submit(system, f"sample {index}", PROMPT) for index in range(4)]
    system.plan_all()
    assert [stream.sequence.status for stream in streams] == [Status.RUNNING] + [Status.WAITING] * 3
    finish(system, *((stream, PROMPT) for stream in streams))
    # One whole prompt, three times its last page, and three further tokens each.
    assert system.core.counts.num_scheduled_tokens == 40 + 3 * 4 + 4 * 3
    assert system.core.counts.num_held == 3


def test_those_behind_go_on() -> None:
    system, _ = start()
    submit(system, "first", PROMPT)
    held = submit(system, "held", [*PROMPT, 3])
    other = submit(system, "other", [7] * 40)
    system.plan_all()
    assert (held.sequence.status, other.sequence.status) == (Status.WAITING, Status.RUNNING)
    finish(system, (held, [*PROMPT, 3]), (other, [7] * 40))


def test_little_in_common_is_computed_twice() -> None:
    system, _ = start()
    submit(system, "first", PROMPT)
    other = submit(system, "other", [*PROMPT[:31], 7, 7, 7])
    system.plan_all()
    assert other.sequence.status is Status.RUNNING
    finish(system)


def test_without_a_cache_nobody_is_held() -> None:
    system, _ = start(cached=False)
    streams = [submit(system, name, PROMPT) for name in "ab"]
    system.plan_all()
    assert [stream.sequence.status for stream in streams] == [Status.RUNNING] * 2
    finish(system, *((stream, PROMPT) for stream in streams))


@pytest.mark.parametrize("end", ["abort", "fail", "lose"])
def test_a_prefill_that_comes_to_nothing_holds_nobody_up(end: str) -> None:
    system, site = start(max_num_batched_tokens=16, run_ahead=False)
    first, held = submit(system, "first", PROMPT), submit(system, "held", PROMPT)
    system.plan_all()
    assert held.sequence.status is Status.WAITING
    if end == "abort":
        system.core.abort(["first"], system.now_ns)
    elif end == "fail":
        result = StepResult(site.results.popleft().step_id, failed_slots=[first.sequence.slot], failed_reasons=["nan"])
        system.core.step_result(site.lane, result, system.now_ns)
    else:
        system.lose(site.lane.lane_id)
        system.join(builders.capacity(max_num_batched_tokens=128))
    system.collect()
    finish(system, (held, PROMPT))


def test_a_held_request_can_be_aborted_and_its_deadline_passes() -> None:
    system, _ = start(max_num_batched_tokens=16)
    first = submit(system, "first", PROMPT)
    submit(system, "aborted", PROMPT)
    late = submit(system, "late", PROMPT, deadline_ns=system.now_ns + 5)
    assert len(system.core.queue) == 2
    system.core.abort(["aborted"], system.now_ns)
    system.core.expire(system.now_ns + 5)
    system.collect()
    assert late.error_code == "deadline_exceeded"
    assert len(system.core.queue) == 0
    finish(system, (first, PROMPT))


def test_prefills_are_not_remembered_for_ever() -> None:
    system, _ = start()
    for index in range(300):
        submit(system, f"r{index}", [index % 50, index // 50] * 3, max_tokens=1)
        system.run()
    assert len(system.core._entrance._prefills) <= 66


# What outputs will need.


def test_without_history_a_share_of_the_limit_is_expected() -> None:
    lengths = OutputLengths()
    found = lengths.expected(np.array([0, 10]), np.array([100, 10**6]), np.zeros(2))
    assert found.tolist() == [PRIOR_SHARE * 100, 10 + PRIOR_SHARE * PRIOR_TOKENS_MAX]
    assert lengths.longest is None


def test_a_length_of_those_that_got_further_is_expected() -> None:
    lengths = OutputLengths()
    for _ in range(HISTORY_MIN // 4):
        for length in (10, 20, 30, 100):
            lengths.record(length)
    made = np.array([0, 0, 0, 0, 10, 10, 25, 99, 100, 150, 0])
    draws = np.array([0, 0.3, 0.6, 0.9, 0, 0.9, 0.2, 0.9, 0, 0.9, 0.9])
    limits = np.array([500] * 10 + [15])
    assert lengths.expected(made, limits, draws).tolist() == [10, 20, 30, 100, 20, 100, 30, 100, 200, 300, 15]
    assert lengths.longest == 100


class Told:
    """Expects what it was told of sequences with so many outputs."""

    longest = None

    def __init__(self, **totals: float) -> None:
        self._totals = {int(made.removeprefix("at_")): total for made, total in totals.items()}

    def record(self, num_output_tokens: int) -> None:
        """Nothing is learnt."""

    def expected(self, made: np.ndarray, limits: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """As told."""
        return np.array([self._totals[int(one)] for one in made], dtype=float)


def test_the_peak_is_when_one_ends_and_not_the_sum_of_all() -> None:
    system, site = start(num_pages=100, page_size=1, run_ahead=False)
    running = submit(system, "runs", [1] * 20, max_tokens=80).sequence
    for _ in range(11):
        system.plan_all()
        system.deliver_result(site)
    system.plan_all()
    assert running.num_output_tokens == 11
    assert len(running.pages) == 31
    new = builders.sequence(system.core, "new", [2] * 30, max_tokens=40)
    # The new one ends after 5 tokens: then both hold 31 + 30 pages and have grown by 5; later the running one alone holds 31 + 50.
    assert peak_pages(site.lane, new, NO_MATCH, Told(at_11=61, at_0=5)) == 31 + 50
    assert peak_pages(site.lane, new, NO_MATCH, Told(at_11=26, at_0=5)) == 31 + 30 + 2 * 5
    assert is_future_sound(site.lane, new, NO_MATCH, Told(at_11=61, at_0=5))
    assert not is_future_sound(site.lane, new, NO_MATCH, Told(at_11=61, at_0=40))


def test_alone_a_sequence_may_always_enter() -> None:
    system, site = start(num_pages=8, page_size=4)
    new = builders.sequence(system.core, "new", [2] * 20, max_tokens=100)
    assert is_future_sound(site.lane, new, NO_MATCH, OutputLengths())


def test_foresight_saves_preemptions_and_costs_little_time() -> None:
    """Method: the same 150 requests over too few pages, with and without a thought for what outputs will need."""
    num_steps, num_preemptions = {}, {}
    for has_foresight in (False, True):
        system = System(builders.scheduler(run_ahead=True, has_foresight=has_foresight))
        system.join(builders.capacity(num_pages=60, page_size=4, max_num_seqs=32, max_num_batched_tokens=64, max_model_len=128))
        for index in range(150):
            submit(system, f"r{index}", [index % 50, index // 50, 1, 2, 3, 4], max_tokens=10 + (index * 7) % 30)
        num_steps[has_foresight] = system.run()
        num_preemptions[has_foresight] = system.core.counts.num_preemptions
        assert system.core.num_requests == 0
    print(f"\nforesight: steps {num_steps}, preemptions {num_preemptions}")
    assert num_preemptions[False] > 30
    assert num_preemptions[True] < num_preemptions[False] / 2
    assert num_steps[True] < 1.1 * num_steps[False]
