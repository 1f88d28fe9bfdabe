"""What happens to requests: refusals, endings, moves between lanes, output to detokenizers."""

from __future__ import annotations

from array import array

import pytest

from headrace.errors import InvalidRequestError, NotFoundError, ReplicaDeadError
from services.scheduler.admission import HARMLESS_TOKENS, LANES_LOST_MAX
from services.scheduler.sequence import FinishReason
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import System


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers() -> None:
    system = System(builders.scheduler())
    system.join(builders.capacity(num_pages=4, page_size=4, max_model_len=128))
    with pytest.raises(InvalidRequestError, match=r"17 tokens .* at most 16"):
        system.submit(builders.sequence(system.core, "pages", [1] * 17))
    system.join(builders.capacity(num_pages=64, page_size=4, max_model_len=128))
    with pytest.raises(InvalidRequestError, match=r"128 tokens .* at most 127"):
        system.submit(builders.sequence(system.core, "length", [1] * 128))
    system.submit(builders.sequence(system.core, "fits", [1] * 127))
    system.run()
    assert next(iter(system.streams.values())).finish is FinishReason.LENGTH


def test_a_long_prompt_goes_to_the_lane_that_can_hold_it() -> None:
    system = System(builders.scheduler())
    small = system.join(builders.capacity(num_pages=4))
    large = system.join(builders.capacity(num_pages=32))
    system.submit(builders.sequence(system.core, "a", [1] * 40))
    system.run()
    assert not small.plans
    assert large.plans


def test_two_idle_lanes_share_the_work() -> None:
    system = System(builders.scheduler())
    sites = [system.join(builders.capacity()) for _ in range(2)]
    for index in range(4):
        system.submit(builders.sequence(system.core, f"r{index}"))
    assert [site.lane.num_running for site in sites] == [2, 2]
    system.run()
    assert all(stream.num_ends == 1 for stream in system.streams.values())


def test_a_lost_lanes_sequences_go_on_where_they_were() -> None:
    system = System(builders.scheduler())
    first = system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a", max_tokens=30))
    system.submit(builders.sequence(system.core, "b", max_tokens=30))
    for _ in range(10):
        system.plan_all()
        system.deliver_result(first)
    system.lose(first.lane.lane_id)
    assert [sequence.request_id for sequence in system.core.queue] == ["a", "b"]
    system.join(builders.capacity(page_size=16))
    system.run()
    assert [len(stream.tokens) for stream in system.streams.values()] == [30, 30]
    assert system.core.counts.num_requeued == 2


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_request_on_every_lane_that_is_lost_ends(num_steps: int) -> None:
    """Method: its worker ends at its first step, at its first decode, or soon after; one that waits is not blamed."""
    system = System(builders.scheduler())
    site = system.join(builders.capacity(max_num_seqs=1))
    for request_id in ("poison", "waits"):
        system.submit(builders.sequence(system.core, request_id, max_tokens=90))
    poison, waits = system.streams.values()
    for life in range(LANES_LOST_MAX):
        assert not poison.num_ends
        site = site if not life else system.join(builders.capacity(max_num_seqs=1))
        for _ in range(num_steps):
            system.plan_all()
            system.deliver_result(site)
        system.plan_all()
        system.lose(site.lane.lane_id)
    assert poison.error_code == "request_failed"
    assert poison.error_message.startswith(f"scheduler: {LANES_LOST_MAX} workers ended while they had request 'poison'")
    system.check_accounting()
    system.join(builders.capacity())
    system.run()
    assert len(waits.tokens) == 90


def test_a_request_that_gets_on_survives_any_number_of_lanes() -> None:
    """Goal: those beside what ends workers are not blamed for it in the long run."""
    system = System(builders.scheduler())
    system.join(builders.capacity(num_pages=128, max_model_len=400))
    sequence = builders.sequence(system.core, "long", max_tokens=300)
    system.submit(sequence)
    for life in range(1, 3 * LANES_LOST_MAX):
        site = system.sites[life]
        # On every third it gets on: what was counted before is forgotten.
        num_tokens = sequence.num_tokens + (HARMLESS_TOKENS if life % 3 == 0 else 1)
        while sequence.num_tokens < num_tokens:
            system.plan_all()
            system.deliver_result(site)
        system.lose(life)
        system.join(builders.capacity(num_pages=128, max_model_len=400))
    system.run()
    stream = next(iter(system.streams.values()))
    assert (len(stream.tokens), stream.error_code) == (300, None)


def test_a_sequence_that_outgrew_every_lane_that_is_left_ends_with_length() -> None:
    system = System(builders.scheduler())
    large = system.join(builders.capacity(num_pages=32))
    system.submit(builders.sequence(system.core, "a", max_tokens=100))
    for _ in range(40):
        system.plan_all()
        system.deliver_result(large)
    system.lose(large.lane.lane_id)
    system.join(builders.capacity(num_pages=4))
    system.run()
    stream = next(iter(system.streams.values()))
    assert stream.finish is FinishReason.LENGTH
    assert len(stream.tokens) == 40


def test_waiting_requests_for_a_model_that_has_gone_are_told() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a"))
    system.lose(site.lane.lane_id)
    system.join(builders.capacity(model="other"))
    assert next(iter(system.streams.values())).error_code == NotFoundError.code


def test_a_lane_with_another_model_cannot_join() -> None:
    system = System(builders.scheduler())
    system.join(builders.capacity())
    with pytest.raises(InvalidRequestError, match="'other' cannot join"):
        system.join(builders.capacity(model="other"))


def former_life(num_output_tokens: int) -> list[int]:
    tokens = array("i", [1, 2, 3])
    for _ in range(num_output_tokens):
        tokens.append(next_token(tokens, 50))
    return tokens.tolist()


def test_outputs_of_a_former_life_count_and_are_not_sent_again() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a", former_life(5), num_output_tokens=5, max_tokens=8))
    system.run()
    stream = next(iter(system.streams.values()))
    assert stream.tokens.tolist() == former_life(8)[3:]
    assert sum(len(plan.new_sequences) for plan in site.plans) == 1
    assert sum(plan.num_rows for plan in site.plans) == 3


def test_a_former_life_that_was_complete_is_only_told_so() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a", former_life(8), num_output_tokens=8, max_tokens=8))
    stream = next(iter(system.streams.values()))
    assert (stream.finish, stream.num_ends) == (FinishReason.LENGTH, 1)
    assert not site.plans
    assert system.core.num_requests == 0


@pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 3), (3, 3), (4, 8)])
def test_a_stop_token_counts_from_min_tokens_on(min_tokens: int, num_tokens: int) -> None:
    outputs = former_life(8)[3:]
    stop = outputs[2]
    assert outputs.count(stop) == 1
    system = System(builders.scheduler())
    system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a", stop=[stop], min_tokens=min_tokens))
    system.run()
    stream = next(iter(system.streams.values()))
    assert len(stream.tokens) == num_tokens
    assert stream.finish is (FinishReason.STOP if num_tokens == 3 else FinishReason.LENGTH)


def test_a_stop_token_as_the_last_token_allowed_is_a_stop() -> None:
    outputs = former_life(3)[3:]
    system = System(builders.scheduler())
    system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a", stop=[outputs[2]], max_tokens=3))
    system.run()
    assert next(iter(system.streams.values())).finish is FinishReason.STOP


def test_a_request_submitted_again_replaces_the_one_that_is_held() -> None:
    system = System(builders.scheduler())
    system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a", stream_id=1, max_tokens=20))
    system.plan_all()
    system.submit(builders.sequence(system.core, "a", stream_id=2, max_tokens=20))
    system.run()
    system.check_accounting()
    assert [stream.num_ends for stream in system.streams.values()] == [1, 1]
    assert [len(stream.tokens) for stream in system.streams.values()] == [0, 20]


def test_tokens_of_one_step_for_one_detokenizer_go_in_one_batch() -> None:
    core = builders.scheduler()
    system = System(core)
    site = system.join(builders.capacity())
    for index in range(4):
        target = f"detokenizer-{index % 2}"
        core.submit(builders.sequence(core, f"r{index}", stream_id=index, detokenizer=target), 0)
    plan = core.plan(site.lane, 0)
    assert plan is not None
    result = site.worker.apply(plan)
    assert result is not None
    core.step_result(site.lane, result, 0)
    batches = core.take_outcome().batches
    assert [(batch.target.address, batch.stream_ids) for batch in batches] == [("detokenizer-0", [0, 2]), ("detokenizer-1", [1, 3])]
    assert [batch.token_ids for batch in batches] == [result.token_ids[::2], result.token_ids[1::2]]


def test_a_redirect_beyond_what_is_here_asks_for_the_request_again() -> None:
    system = System(builders.scheduler())
    system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a"))
    with pytest.raises(ReplicaDeadError, match=r"position 5 .* has 0"):
        system.core.redirect("a", system.core.outbox.target("other", 1), from_position=5, now_ns=0)
    system.collect()
    assert system.core.num_requests == 0
    system.run()


def test_finished_output_is_kept_for_a_detokenizer_that_hangs_but_not_for_ever() -> None:
    system = System(builders.scheduler(linger_s=30))
    system.join(builders.capacity())
    system.deaf.add("detokenizer-0")
    system.submit(builders.sequence(system.core, "a"))
    system.run()
    assert system.core.outbox.num_kept == 1
    system.now_ns += 29_000_000_000
    system.core.expire(system.now_ns)
    assert system.core.outbox.num_kept == 1
    system.now_ns += 2_000_000_000
    system.core.expire(system.now_ns)
    assert system.core.outbox.num_kept == 0
    assert not list(system.core.outbox), "the target is forgotten, too"


def test_a_kept_output_can_be_redirected() -> None:
    system = System(builders.scheduler())
    system.join(builders.capacity())
    system.deaf.add("detokenizer-0")
    system.submit(builders.sequence(system.core, "a"))
    system.run()
    system.core.redirect("a", system.core.outbox.target("detokenizer-1", 7), from_position=0, now_ns=system.now_ns)
    system.collect()
    stream = next(iter(system.streams.values()))
    assert (len(stream.tokens), stream.finish) == (8, FinishReason.LENGTH)
    assert system.core.outbox.num_kept == 0


def test_the_deadline_error_says_how_far_it_came() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity(max_num_seqs=1))
    deadline_ns = system.now_ns + 1_000
    system.submit(builders.sequence(system.core, "a", deadline_ns=deadline_ns))
    system.submit(builders.sequence(system.core, "b", deadline_ns=deadline_ns))
    for _ in range(3):
        system.plan_all()
        system.deliver_result(site)
    system.core.expire(deadline_ns)
    errors = {ending.sequence.request_id: ending.error for ending in system.core.take_outcome().endings}
    assert "3 output tokens made" in str(errors["a"])
    assert "in the waiting queue" in str(errors["b"])
    assert system.core.next_deadline_ns() is None


def test_tokens_of_a_request_aborted_before_they_could_go_are_not_kept() -> None:
    core = builders.scheduler()
    system = System(core)
    site = system.join(builders.capacity())
    core.submit(builders.sequence(core, "a"), 0)
    plan = core.plan(site.lane, 0)
    assert plan is not None
    result = site.worker.apply(plan)
    assert result is not None
    core.step_result(site.lane, result, 0)
    core.abort(["a"], 0)
    (batch,) = core.take_outcome().batches
    core.outbox.hold(batch)
    assert batch.target.rest() is None
    assert core.outbox.num_kept == 0


def test_the_last_tokens_alone_are_kept_and_can_be_redirected() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a", max_tokens=2))
    system.plan_all()
    system.deliver_result(site)
    system.deaf.add("detokenizer-0")
    system.run()
    assert system.core.outbox.num_kept == 1
    system.core.redirect("a", system.core.outbox.target("detokenizer-1", 7), from_position=1, now_ns=system.now_ns)
    system.collect()
    stream = next(iter(system.streams.values()))
    assert (len(stream.tokens), stream.finish) == (2, FinishReason.LENGTH)


def test_a_steady_stream_goes_to_its_new_detokenizer_from_the_next_step_on() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity(page_size=16))
    for name in ("a", "b"):
        system.submit(builders.sequence(system.core, name, max_tokens=12))
    for _ in range(4):
        system.plan_all()
        system.deliver_result(site)
    system.core.redirect("a", system.core.outbox.target("detokenizer-1", 7), from_position=4, now_ns=system.now_ns)
    assert not system.core.take_outcome().behind, "there is nothing to send again"
    # The system asserts that each batch goes where its streams belong.
    system.run()
    assert [len(stream.tokens) for stream in system.streams.values()] == [12, 12]


def test_what_is_behind_goes_from_the_first_token_that_did_not() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity())
    system.submit(builders.sequence(system.core, "a"))
    for num_steps in range(4):
        if num_steps == 1:
            system.deaf.add("detokenizer-0")
        system.plan_all()
        system.deliver_result(site)
    (target,) = system.core.outbox
    rest = target.rest()
    assert rest is not None
    assert (rest.first_positions, rest.num_tokens) == ([1], [3])
    system.deaf.clear()
    system.run()
    assert len(next(iter(system.streams.values())).tokens) == 8
