"""Constrained sequences: rows that give no token while a grammar is compiled, and outputs that end because nothing may follow."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from services.scheduler.sequence import FinishReason
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import Stream, System


def start(*, run_ahead: bool = True, **sizes: Any) -> System:
    system = System(builders.scheduler(run_ahead=run_ahead))
    system.join(builders.capacity(**sizes))
    return system


def submit(system: System, request_id: str, *, num_withheld: int = 0, num_at_end: int = 0, **how: Any) -> Stream:
    """Put a request in whose first rows give no token, and which ends at so many tokens, where these are given."""
    sequence = builders.sequence(system.core, request_id, (1, 2, 3), **how)
    if num_withheld or num_at_end:
        sequence.constraint = (num_withheld, num_at_end)
    system.submit(sequence)
    return system.streams[sequence.stream_id]


def alone(num_tokens: int) -> array[int]:
    tokens = array("i", (1, 2, 3))
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, 50))
    return tokens[3:]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
@pytest.mark.parametrize("num_withheld", [1, 2, 7])
@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_rows_without_tokens_change_nothing_but_the_steps(
    run_ahead: bool, page_size: int, num_withheld: int, max_tokens: int
) -> None:
    system = start(run_ahead=run_ahead, page_size=page_size, num_pages=128 // page_size)
    late = submit(system, "late", num_withheld=num_withheld, max_tokens=max_tokens)
    other = submit(system, "other", max_tokens=5)
    while system.plan_all() or any(site.results for site in system.sites.values()):
        for site in system.sites.values():
            system.deliver_result(site)
        system.check_accounting()
    assert late.tokens == alone(max_tokens)
    assert other.tokens == alone(5)
    assert late.finish is other.finish is FinishReason.LENGTH


@pytest.mark.parametrize("run_ahead", [False, True])
def test_where_nothing_may_follow_a_sequence_ends_with_a_stop(run_ahead: bool) -> None:
    system = start(run_ahead=run_ahead)
    stream = submit(system, "a", num_at_end=3 + 4, max_tokens=9)
    other = submit(system, "b", max_tokens=9)
    system.run()
    assert stream.tokens == alone(4)
    assert stream.finish is FinishReason.STOP
    assert stream.sequence.num_stop_tokens == 0, "its last token is text"
    assert other.tokens == alone(9)
    system.check_accounting()


def test_an_end_of_sequence_token_is_a_stop_token_there_too() -> None:
    system = start()
    last = alone(4)[-1]
    stream = submit(system, "a", num_at_end=3 + 4, max_tokens=9, stop=(last,), min_tokens=6)
    system.run()
    assert (stream.tokens, stream.finish) == (alone(4), FinishReason.STOP)
    assert stream.sequence.num_stop_tokens == 1


def test_the_end_may_come_with_the_last_token_allowed() -> None:
    system = start()
    stream = submit(system, "a", num_at_end=3 + 4, max_tokens=4)
    system.run()
    assert (stream.tokens, stream.finish, stream.num_ends) == (alone(4), FinishReason.STOP, 1)


def test_others_take_over_a_prompt_only_when_its_first_token_is_there() -> None:
    system = start(page_size=1, num_pages=128)
    submit(system, "late", num_withheld=5, max_tokens=3)
    for _ in range(3):
        system.plan_all()
        for site in system.sites.values():
            system.deliver_result(site)
    assert not next(iter(system.sites.values())).lane.kv.tree.num_pages
    other = submit(system, "other", max_tokens=3)
    system.run()
    assert other.tokens == alone(3)
    system.check_accounting()


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_withheld", [1, 2, 5])
def test_a_prompt_is_shared_from_the_first_token_on_however_late_that_came(run_ahead: bool, num_withheld: int) -> None:
    """Goal: who waits for a prompt does not wait for its whole output. Method: the others are short, and end while it runs."""
    system = start(run_ahead=run_ahead, num_pages=256, max_num_batched_tokens=64)
    prompt = [token % 50 for token in range(7, 47)]
    late = builders.sequence(system.core, "late", prompt, max_tokens=60, fork_group="choices")
    late.constraint = (num_withheld, 0)
    choice = builders.sequence(system.core, "choice", prompt, max_tokens=3, fork_group="choices")
    other = builders.sequence(system.core, "other", [*prompt, 1, 2], max_tokens=3)
    for sequence in (late, choice, other):
        system.submit(sequence)
    site = next(iter(system.sites.values()))
    while late.num_output_tokens < 12:
        system.plan_all()
        system.deliver_result(site)
        system.check_accounting()
        if not late.num_output_tokens:
            assert choice.lane is other.lane is None
    assert choice.finish_reason is other.finish_reason is FinishReason.LENGTH
    assert system.core.counts.num_forked == 1
    assert other.num_cached_tokens == 40
    assert site.lane.kv.tree.num_pages >= 40 // 4
    system.run()
    system.check_accounting()


def test_an_unconstrained_row_without_a_token_fails() -> None:
    system = start()
    stream = submit(system, "a", num_withheld=1, max_tokens=3)
    system.plan_all()
    stream.sequence.constraint = None
    system.run()
    assert stream.error_code == "request_failed"
