"""Rows that give several tokens: a worker that guesses well is followed, and what it may not say ends the request it is about."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from headrace.errors import DeadlineExceededError, InvalidRequestError
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import scheduler_pb2 as wire
from services.scheduler import messages
from services.scheduler.deadlines import BestSpeed
from services.scheduler.radix_tree import RadixTree
from services.scheduler.sequence import FinishReason
from services.scheduler.step_plan import StepPlan, StepResult
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import Site, Stream, System

NUM_DRAFTS = 3


def start(*, run_ahead: bool = True, are_drafts_right: bool = True, **sizes: Any) -> tuple[System, Site]:
    """A system with one lane that verifies three drafts a row."""
    system = System(builders.scheduler(run_ahead=run_ahead))
    site = system.join(builders.capacity(**({"max_num_drafts": NUM_DRAFTS, "max_num_batched_tokens": 64} | sizes)))
    site.worker.are_drafts_right = are_drafts_right
    return system, site


def submit(system: System, request_id: str = "a", prompt: tuple[int, ...] = (1, 2, 3), **how: Any) -> Stream:
    sequence = builders.sequence(system.core, request_id, prompt, **how)
    system.submit(sequence)
    return system.streams[sequence.stream_id]


def alone(prompt: tuple[int, ...], num_tokens: int) -> array[int]:
    """The first output tokens of a prompt."""
    tokens = array("i", prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, 50))
    return tokens[len(prompt) :]


def drafts_of(site: Site, stream: Stream) -> list[int]:
    return [num_drafts for num_drafts, _ in site.worker.drafts[stream.sequence.slot]]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_right_drafts_save_steps_and_every_row_has_pages_for_all_it_may_carry(run_ahead: bool, page_size: int) -> None:
    system, site = start(run_ahead=run_ahead, page_size=page_size, num_pages=128 // page_size)
    stream = submit(system, max_tokens=60)
    system.run()
    assert stream.tokens == alone((1, 2, 3), 60)
    assert stream.finish is FinishReason.LENGTH
    # The prompt's step gives one token, and every other four, but for the last ones.
    rooms = [num_drafts for num_drafts, _ in site.worker.drafts[0]]
    assert set(rooms[:-3]) == {NUM_DRAFTS}
    assert len(rooms) <= 59 // (1 + NUM_DRAFTS) + 3
    assert sum(plan.num_rows for plan in site.plans) == 1 + len(rooms)


def test_wrong_drafts_change_nothing_but_the_steps() -> None:
    found = {}
    for num_drafts in (0, NUM_DRAFTS):
        system, site = start(are_drafts_right=False, max_num_drafts=num_drafts)
        streams = [submit(system, f"r{index}", (index, 2), max_tokens=30 + index) for index in range(5)]
        system.run()
        found[num_drafts] = [(stream.tokens, stream.finish) for stream in streams]
        assert (site.worker.drafts == {}) == (num_drafts == 0)
    assert found[0] == found[NUM_DRAFTS]
    some = [right for each in site.worker.drafts.values() for _, right in each]
    assert set(some) == {0, 1, 2, 3}


def test_a_stop_token_among_accepted_drafts_ends_the_output_there() -> None:
    outputs = alone((1, 2, 3), 12)
    assert outputs[7] not in outputs[:7]
    system, _ = start()
    stream = submit(system, max_tokens=60, stop=[outputs[7]])
    other = submit(system, "b", (9, 9), max_tokens=20)
    system.run()
    assert stream.tokens == outputs[:8]
    assert stream.finish is FinishReason.STOP
    assert stream.sequence.num_stop_tokens == 1
    assert other.tokens == alone((9, 9), 20)


def test_a_stop_token_below_min_tokens_does_not_count() -> None:
    outputs = alone((1, 2, 3), 30)
    first = next(index for index in range(1, 9) if outputs[index] in outputs[index + 1 :])
    system, _ = start()
    stream = submit(system, max_tokens=60, stop=[outputs[first]], min_tokens=first + 2)
    system.run()
    assert stream.tokens == outputs[: first + 2 + outputs[first + 1 :].index(outputs[first])]


@pytest.mark.parametrize("max_tokens", range(1, 14))
def test_no_output_is_longer_than_asked(max_tokens: int) -> None:
    system, site = start()
    stream = submit(system, max_tokens=max_tokens)
    system.run()
    assert stream.tokens == alone((1, 2, 3), max_tokens)
    assert stream.finish is FinishReason.LENGTH
    assert not site.worker.held


def test_the_context_length_ends_it_as_without_drafts() -> None:
    system, _ = start(max_model_len=20)
    stream = submit(system, max_tokens=None)
    system.run()
    assert stream.tokens == alone((1, 2, 3), 17)


def test_nobody_is_preempted_for_pages_that_only_guesses_need() -> None:
    # Pages for what is sure, and for little else: two short outputs end just as the long one needs what they leave.
    for num_drafts in (0, NUM_DRAFTS):
        system, site = start(num_pages=6, page_size=4, max_num_drafts=num_drafts, are_drafts_right=False)
        lengths = [20, 5, 5]
        streams = [submit(system, f"r{index}", (index, 2, 3), max_tokens=length) for index, length in enumerate(lengths)]
        system.run()
        assert system.core.counts.num_preemptions == 0
        assert [stream.tokens for stream in streams] == [alone((index, 2, 3), length) for index, length in enumerate(lengths)]
    assert min(room for room, _ in site.worker.drafts[0]) < NUM_DRAFTS


def test_preempted_sequences_go_on_where_they_were() -> None:
    system, _ = start(num_pages=6, page_size=4, are_drafts_right=False)
    streams = [submit(system, f"r{index}", (index,) * 5, max_tokens=14) for index in range(4)]
    system.run()
    assert system.core.counts.num_preemptions > 0
    assert [stream.tokens for stream in streams] == [alone((index,) * 5, 14) for index in range(4)]


def test_each_detokenizer_gets_its_own_tokens() -> None:
    system, _ = start(are_drafts_right=False)
    streams = [submit(system, f"r{index}", (index, 7), max_tokens=25, detokenizer=f"detokenizer-{index % 2}") for index in range(5)]
    system.run()
    assert [stream.tokens for stream in streams] == [alone((index, 7), 25) for index in range(5)]


def test_a_request_may_have_none_or_fewer() -> None:
    system, site = start()
    none, one = submit(system, "none", num_drafts_asked=0, max_tokens=20), submit(system, "one", num_drafts_asked=1, max_tokens=20)
    system.plan_all()
    slots = none.sequence.slot, one.sequence.slot
    system.run()
    assert slots[0] not in site.worker.drafts
    assert {num_drafts for num_drafts, _ in site.worker.drafts[slots[1]]} == {0, 1}
    assert none.tokens == one.tokens


def test_drafts_that_no_lane_verifies_are_refused_with_the_numbers() -> None:
    system, _ = start()
    submit(system, "fits", wants_drafts=True, num_drafts_asked=NUM_DRAFTS)
    with pytest.raises(InvalidRequestError, match="num_speculative_tokens is 4 and the workers verify 3 at most") as refused:
        submit(system, "more", wants_drafts=True, num_drafts_asked=NUM_DRAFTS + 1)
    assert refused.value.param == "speculative.num_speculative_tokens"
    system, _ = start(max_num_drafts=0)
    with pytest.raises(InvalidRequestError, match="the workers here do not speculate") as refused:
        submit(system, "any", wants_drafts=True)
    assert refused.value.param == "speculative"
    # One that comes from elsewhere with outputs goes on: it gets the same without.
    stream = submit(system, "moved", (1, 2, 3, *alone((1, 2, 3), 2)), num_output_tokens=2, wants_drafts=True, num_drafts_asked=9)
    submit(system, "does not care", num_drafts_asked=0)
    system.run()
    assert stream.tokens == alone((1, 2, 3), 8)


def answer(plan: StepPlan, site: Site, *pieces: list[int]) -> StepResult:
    slots = site.lane.in_flight[plan.step_id].sampled.slots
    return StepResult(plan.step_id, list(slots), [token for piece in pieces for token in piece], [len(piece) for piece in pieces])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (([1, 2, 3, 4, 5], [7]), "5 tokens came back; with 3 drafts at most"),
        (([], [7]), "0 tokens came back"),
        (([1, 50], [7]), "token 50 came back and the vocabulary has 50"),
    ],
    ids=["more than drafts", "none", "outside the vocabulary"],
)
def test_a_worker_that_says_what_cannot_be_ends_that_request_alone(pieces: tuple[list[int], ...], message: str) -> None:
    system, site = start(run_ahead=False)
    bad, good = submit(system, "bad"), submit(system, "good", (4, 5))
    plan = system.core.plan(site.lane, system.now_ns)
    assert plan is not None
    system.core.step_result(site.lane, answer(plan, site, *pieces), system.now_ns)
    (ending,) = system.core.take_outcome().endings
    assert ending.sequence is bad.sequence
    assert ending.error is not None and message in ending.error.message
    assert good.sequence.tokens.tolist() == [4, 5, 7]
    system.check_accounting()


def test_a_worker_that_goes_past_the_end_of_a_request_ends_it() -> None:
    system, site = start(run_ahead=False)
    submit(system, max_tokens=2)
    plan = system.core.plan(site.lane, system.now_ns)
    assert plan is not None
    system.core.step_result(site.lane, answer(plan, site, [1, 2, 3]), system.now_ns)
    (ending,) = system.core.take_outcome().endings
    assert ending.error is not None and "3 tokens of 5" in ending.error.message


def test_counts_that_do_not_match_the_tokens_fail_the_step() -> None:
    system, site = start(run_ahead=False)
    submit(system, "a"), submit(system, "b")
    plan = system.core.plan(site.lane, system.now_ns)
    assert plan is not None
    result = answer(plan, site, [1, 2], [3])
    result.num_tokens[0] = 3
    system.core.step_result(site.lane, result, system.now_ns)
    assert len(system.core.take_outcome().endings) == 2
    system.check_accounting()


def test_a_deadline_is_lost_only_if_every_draft_were_right_and_it_still_were() -> None:
    speed = BestSpeed()
    speed.record(1, 10_000_000)
    assert speed.least_ns(1, 1) == 10_000_000
    for num_drafts, is_lost in ((0, True), (NUM_DRAFTS, False)):
        system, site = start(max_num_drafts=num_drafts, run_ahead=False)
        submit(system, "first", max_tokens=1)
        plan = system.core.plan(site.lane, system.now_ns)
        assert plan is not None
        result = answer(plan, site, [9])
        system.core.step_result(site.lane, StepResult(result.step_id, result.slots, [9], duration_ns=10_000_000), system.now_ns)
        system.core.take_outcome()
        # Nine tokens are nine steps of 10 ms, or three where each gives four.
        stream = submit(system, "second", max_tokens=9, min_tokens=9, deadline_ns=system.now_ns + 50_000_000)
        assert (stream.error_code == DeadlineExceededError.code) == is_lost


def foretold(system: System, request_id: str, prompt: list[int], **how: Any) -> list[int]:
    """What a worker would be told of a request that is then given up."""
    stream = submit(system, request_id, tuple(prompt), **how)
    assert stream.sequence.lane is not None
    found = stream.sequence.foretold.tolist()
    system.core.abort([request_id], system.now_ns)
    system.run()
    return found


def test_a_worker_is_told_what_came_after_the_same_tokens_before() -> None:
    system, _ = start(page_size=4)
    prompt = list(range(10, 20))
    first = submit(system, "first", tuple(prompt), max_tokens=11)
    assert not first.sequence.foretold
    system.run()
    # Of its 21 tokens the last was never computed, and five pages are full.
    known = prompt + first.tokens.tolist()[:10]
    assert foretold(system, "same", prompt) == known[10:]
    assert foretold(system, "further", known[:13]) == known[13:]
    assert foretold(system, "page border", known[:16]) == known[16:]
    assert foretold(system, "all", known) == []
    assert foretold(system, "other end", [*prompt[:-1], 9]) == []
    assert foretold(system, "more than a page of it is new", [*prompt[:4], 1, 2, 3, 4, 5]) == []
    assert foretold(system, "other salt", prompt, namespace="salt") == []
    assert foretold(system, "no drafts", prompt, num_drafts_asked=0) == []
    for site in system.sites.values():
        site.lane.kv.flush()
    assert foretold(system, "flushed", prompt) == []


def test_of_several_that_came_after_the_latest_used_is_told() -> None:
    tree = RadixTree(2)
    for number, tail in enumerate(([5, 6], [7, 8], [9, 10, 11, 12])):
        tokens = [1, 2, *tail]
        pages = list(range(10 * number, 10 * number + len(tokens) // 2))
        tree.insert(array("i", tokens).tobytes(), pages)
    (above,) = tree._roots[""].children.values()

    def after(*tokens: int, most: int = 100) -> list[int]:
        return array("i", tree.after(above, array("i", tokens).tobytes(), most * 4)).tolist()

    assert after() == [9, 10, 11, 12]
    assert after(most=3) == [9, 10, 11]
    assert after(7) == [8]
    tree.insert(array("i", [1, 2, 5, 6]).tobytes(), [0, 1])
    assert after() == [5, 6]
    assert array("i", tree.after(None, array("i", [1]).tobytes(), 8)).tolist() == [2, 5]
    assert tree.after(None, b"", 8, "elsewhere") == b""


def test_no_prefix_cache_no_foretelling() -> None:
    system = System(builders.scheduler(eviction=None))
    system.join(builders.capacity(max_num_drafts=NUM_DRAFTS))
    submit(system, "first", (1, 2, 3), max_tokens=20)
    system.run()
    assert foretold(system, "same", [1, 2, 3]) == []


def test_messages_carry_what_a_worker_must_know_of_drafts() -> None:
    capacity = control.Capacity(
        model=common.ModelInfo(name=builders.MODEL, max_model_len=64),
        pools=[control.PagePoolInfo(name="full", num_pages=8, page_size=8)],
        max_num_seqs=2,
        max_num_batched_tokens=16,
        work_kinds=[control.WORK_KIND_GENERATE],
        vocab_size=50,
        max_num_drafts=5,
    )
    system = System(builders.scheduler())
    site = system.join(messages.lane_capacity(capacity))
    target = system.core.outbox.target("detokenizer-0", 7)

    def taken(speculative: common.SpeculativeParams | None) -> Any:
        body = wire.Submit(model=builders.MODEL, speculative=speculative)
        body.work.request_id = "r"
        body.stopping.max_tokens = 6
        return messages.sequence(body, array("i", [1, 2, 3]), owner=1, target=target, now_ns=0, now_unix_ns=0)

    off = taken(common.SpeculativeParams(method=common.SPECULATIVE_METHOD_OFF))
    assert (off.wants_drafts, off.num_drafts_asked) == (False, 0)
    assert (taken(None).wants_drafts, taken(None).num_drafts_asked) == (False, None)
    asked = common.SpeculativeParams(method=common.SPECULATIVE_METHOD_NGRAM, num_speculative_tokens=2)
    sequence = taken(asked)
    assert (sequence.wants_drafts, sequence.num_drafts_asked) == (True, 2)
    sequence.sampling = common.SamplingParams()
    system.core.submit(sequence, 0)
    plan = system.core.plan(site.lane, 0)
    assert plan is not None
    body, _ = messages.step_plan(plan, [common.WorkHeader()])
    (new,) = body.new_sequences
    assert (new.max_num_drafts, new.max_num_tokens, new.speculative) == (2, 9, asked)
    sequence.foretold = array("i", [7, 8])
    body, frames = messages.step_plan(plan, [common.WorkHeader()])
    assert body.new_sequences[0].num_foretold_tokens == 2
    assert array("i", frames[0]).tolist() == [1, 2, 3, 7, 8]
    result = wire.StepResult(step_id=plan.step_id, slots=[0], token_ids=[4, 5], num_tokens=[2], num_drafts=[3])
    assert messages.step_result(result).num_tokens == [2]
    assert messages.step_result(result).num_drafts == 3
    assert np.array_equal(messages.step_result(result).token_ids, [4, 5])
