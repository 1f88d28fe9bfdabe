"""Goal: logprobs reach the detokenizer with their tokens, each once and at its position, whatever happens to lanes and links.

The worker on paper makes each logprob a function of position and token, so a wrong one shows.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import pytest

from headrace.errors import InvalidRequestError
from headrace.v1 import common_pb2 as common
from headrace.v1 import scheduler_pb2 as scheduler
from services.scheduler import messages
from services.scheduler.lane import LaneCapacity
from services.scheduler.logprob_messages import logs_by_row
from services.scheduler.logprobs import NUMBERS_MAX, PROMPT_LOGITS_MAX, TokenLogs
from services.scheduler.outbox import Target
from services.scheduler.sequence import Sequence
from services.scheduler.step_plan import StepPlan, StepResult
from services.scheduler.token_fanout import StreamBatch
from tests.unit.scheduler.builders import capacity, sequence
from tests.unit.scheduler.builders import scheduler as make_scheduler
from tests.unit.scheduler.fake_worker import FakeWorker
from tests.unit.scheduler.system import Site, Stream, System


def logprob(position: int, token_id: int) -> float:
    """That of a token at a position of the whole sequence; exact in float32."""
    return -position - token_id / 64


def told_of(tokens: array[int], start: int, end: int, num_top: int) -> TokenLogs:
    """What a worker tells of the tokens from one position to before another."""
    logs = TokenLogs(num_top)
    for position in range(start, end):
        top = range(position, position + num_top)
        logs.extend([logprob(position, tokens[position])], top, [logprob(position, likely) for likely in top])
    return logs


class TellingWorker(FakeWorker):
    """Tells logprobs of those who asked."""

    is_silent = False

    def __init__(self, size: LaneCapacity) -> None:
        super().__init__(size)
        self.asked: dict[int, tuple[int | None, int | None, int]] = {}
        self.num_prompt_tokens: list[int] = []

    def apply(self, plan: StepPlan) -> StepResult | None:
        for entered in plan.new_sequences:
            wanted = entered.prompt_logprobs if entered.wants_prompt_logprobs else None
            prompt = None if wanted is None else wanted.num_top
            outputs = entered.logprobs.num_top if entered.logprobs is not None else None
            self.asked[entered.slot] = outputs, prompt, entered.num_prompt_tokens
            if entered.wants_prompt_logprobs:
                assert not entered.num_reused_tokens
        starts = {slot: held.num_computed for slot, held in self.held.items()} | {
            entered.slot: entered.num_reused_tokens for entered in plan.new_sequences
        }
        result = super().apply(plan)
        if result is None or self.is_silent:
            return result
        for slot, held in self.held.items():
            num_top, num_prompt_top, num_prompt = self.asked[slot]
            if slot in result.slots and num_top is not None:
                result.logprobs[slot] = told_of(held.tokens, len(held.tokens) - 1, len(held.tokens), num_top)
            end = min(held.num_computed, num_prompt - 1)
            if num_prompt_top is not None and end > starts[slot]:
                self.num_prompt_tokens.append(end - starts[slot])
                result.prompt_logprobs[slot] = told_of(held.tokens, starts[slot] + 1, end + 1, num_prompt_top)
        return result


@dataclass
class Told:
    """What a stream's detokenizer has been told."""

    outputs: TokenLogs | None = None
    prompt: TokenLogs | None = None
    prompt_ids: list[int] = field(default_factory=list)


class TellingSystem(System):
    """Reads the messages that go to detokenizers."""

    def __init__(self, *, run_ahead: bool = False) -> None:
        super().__init__(make_scheduler(run_ahead=run_ahead))
        self.told: dict[int, Told] = {}

    def join(self, capacity: LaneCapacity) -> Site:
        site = super().join(capacity)
        site.worker = TellingWorker(capacity)
        return site

    def _receive(self, batch: StreamBatch) -> bool:
        lengths = {stream_id: len(self.streams[stream_id].tokens) for stream_id in batch.stream_ids}
        if not super()._receive(batch):
            return False
        body = messages.token_batch(batch, enqueued_unix_ns=1)
        for place, logs in logs_by_row(body.logprobs).items():
            stream_id, first = batch.stream_ids[place], batch.first_positions[place]
            told = self.told.setdefault(stream_id, Told())
            told.outputs = TokenLogs(logs.num_top) if told.outputs is None else told.outputs
            told.outputs.append(logs.part(lengths[stream_id] - first, len(logs)))
        start = 0
        for place, logs in logs_by_row(body.prompt_logprobs).items():
            told = self.told.setdefault(batch.stream_ids[place], Told())
            told.prompt, told.prompt_ids = logs, list(body.prompt_token_ids[start : start + len(logs)])
            start += len(logs)
        return True

    def ask(self, request_id: str, tokens: tuple[int, ...] | range, **wants: int | None) -> Stream:
        asked = sequence(self.core, request_id, tokens, **wants)  # type: ignore[arg-type]
        self.submit(asked)
        return self.streams[asked.stream_id]

    def check(self, stream: Stream, logprobs: int | None, prompt_logprobs: int | None) -> None:
        """A stream has all that was asked for, and nothing else."""
        known: Sequence = stream.sequence
        told = self.told.get(known.stream_id, Told())
        if logprobs is None:
            assert told.outputs is None
        else:
            assert told.outputs == told_of(known.tokens, known.num_prompt_tokens, known.num_tokens, logprobs)
        if prompt_logprobs is None:
            assert told.prompt is None
        else:
            assert told.prompt is not None
            assert told.prompt_ids == known.tokens[: known.num_prompt_tokens].tolist()
            assert told.prompt.part(1, len(told.prompt)) == told_of(known.tokens, 1, known.num_prompt_tokens, prompt_logprobs)
            assert told.prompt.part(0, 1).logprobs[0] != told.prompt.part(0, 1).logprobs[0]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_all_who_asked_are_told_and_nobody_else(run_ahead: bool) -> None:
    system = TellingSystem(run_ahead=run_ahead)
    system.join(capacity(max_num_batched_tokens=8))
    wants = [(2, None), (None, None), (0, 3), (None, 1), (20, 20)]
    streams = [
        system.ask(f"r{index}", range(index, index + 9 + index), logprobs=outputs, prompt_logprobs=prompt)
        for index, (outputs, prompt) in enumerate(wants)
    ]
    one_token = system.ask("one", (5,), prompt_logprobs=1)
    system.run()
    for stream, (outputs, prompt) in zip(streams, wants, strict=True):
        assert len(stream.tokens) == 8
        system.check(stream, outputs, prompt)
    system.check(one_token, None, 1)
    assert not any(site.lane.fanout.num_telling for site in system.sites.values())


@pytest.mark.parametrize("run_ahead", [False, True])
def test_preempted_and_moved_sequences_tell_each_token_once(run_ahead: bool) -> None:
    system = TellingSystem(run_ahead=run_ahead)
    system.join(capacity(num_pages=7, page_size=4, max_num_batched_tokens=8))
    streams = [
        system.ask(f"r{index}", (index,) * 6, logprobs=1, prompt_logprobs=1 if index % 2 else None, max_tokens=14)
        for index in range(4)
    ]
    for _ in range(6):
        for site in system.sites.values():
            system.deliver_result(site)
        system.plan_all()
    # In the middle of a prompt, too.
    system.ask("late", range(20), logprobs=0, prompt_logprobs=0)
    late = system.streams[sequence(system.core, "late").stream_id]
    lane_id = next(iter(system.sites))
    system.join(capacity(num_pages=7, page_size=4, max_num_batched_tokens=8))
    system.lose(lane_id)
    system.run()
    assert system.core.counts.num_preemptions > 0
    for index, stream in enumerate(streams):
        system.check(stream, 1, 1 if index % 2 else None)
    system.check(late, 0, 0)


def test_what_a_deaf_detokenizer_missed_comes_again_with_its_logprobs() -> None:
    system = TellingSystem()
    system.join(capacity())
    stream = system.ask("r", range(9), logprobs=2, prompt_logprobs=1)
    system.deaf.add("detokenizer-0")
    for _ in range(5):
        for site in system.sites.values():
            system.deliver_result(site)
        system.plan_all()
    system.deaf.clear()
    system.run()
    system.flush(stream.sequence.target)
    system.check(stream, 2, 1)


def test_a_prompt_is_computed_whole_and_a_bounded_part_at_a_time() -> None:
    system = TellingSystem()
    site = system.join(capacity(num_pages=400, max_num_batched_tokens=512, max_model_len=512))
    system.ask("warm", range(300), max_tokens=1)
    system.run()
    first = system.ask("a", range(300), prompt_logprobs=0, max_tokens=2)
    second = system.ask("b", range(300), prompt_logprobs=0, max_tokens=2)
    system.run()
    system.check(first, None, 0)
    system.check(second, None, 0)
    assert isinstance(site.worker, TellingWorker)
    assert sum(site.worker.num_prompt_tokens) == 2 * 299
    assert max(plan.num_tokens for plan in site.plans[-8:]) <= PROMPT_LOGITS_MAX + 2
    # Who wants no logprobs of it still finds it cached.
    third = system.ask("c", range(300), logprobs=0, max_tokens=2)
    system.run()
    assert third.sequence.num_cached_tokens > 200
    system.check(third, 0, None)


def test_slow_prompts_hold_nobody_up_not_even_those_that_begin_alike() -> None:
    system = TellingSystem()
    site = system.join(capacity(num_pages=800, max_num_batched_tokens=256, max_model_len=1024))
    slow = [system.ask(f"slow{index}", range(600), prompt_logprobs=0, max_tokens=2) for index in range(3)]
    alike = system.ask("alike", range(100), max_tokens=2)
    system.plan_all()
    assert [stream.sequence.lane is not None for stream in (*slow, alike)] == [True] * 4
    assert system.core.counts.num_held == 0
    assert alike.sequence in site.lane.decoding
    system.run()
    for stream in slow:
        system.check(stream, None, 0)
    assert len(alike.tokens) == 2


def test_a_worker_that_tells_nothing_fails_those_who_asked_alone() -> None:
    system = TellingSystem()
    site = system.join(capacity())
    assert isinstance(site.worker, TellingWorker)
    site.worker.is_silent = True
    asked, prompted = system.ask("a", (1, 2, 3), logprobs=1), system.ask("p", (1, 2, 3), prompt_logprobs=1)
    other = system.ask("b", (1, 2, 4))
    system.run()
    assert [stream.error_code for stream in (asked, prompted, other)] == ["request_failed", "request_failed", None]
    assert (len(asked.tokens), len(prompted.tokens), len(other.tokens)) == (0, 0, 8)
    system.check_accounting()


def test_a_prompt_that_would_tell_too_much_is_refused_with_the_numbers() -> None:
    system = TellingSystem()
    system.join(capacity(num_pages=6_000, max_model_len=20_000))
    with pytest.raises(InvalidRequestError, match=f"prompt_logprobs would be 210000 numbers.*limit is {NUMBERS_MAX}"):
        system.ask("r", range(10_000), prompt_logprobs=20)


def test_messages_carry_what_a_worker_must_know() -> None:
    submit = scheduler.Submit(
        num_tokens=5,
        num_output_tokens=2,
        sampling=common.SamplingParams(frequency_penalty=0.5),
        stopping=common.StoppingParams(min_tokens=4, stop_token_ids=[9, 7]),
        eos_token_ids=[2],
        logprobs=3,
        fork_group="g",
    )
    made = messages.sequence(submit, array("i", range(5)), owner=1, target=Target("a", 1), now_ns=1, now_unix_ns=1)
    made.slot = 0
    assert (made.num_drafts_asked, made.fork_group) == (0, "g")
    assert made.logprobs is not None
    assert len(made.logprobs) == 2
    body, _ = messages.step_plan(StepPlan(1, new_sequences=[made]), [common.WorkHeader()])
    (entry,) = body.new_sequences
    assert (entry.num_output_tokens, entry.logprobs, entry.HasField("prompt_logprobs")) == (2, 3, False)
    assert (entry.min_output_tokens, list(entry.stop_token_ids)) == (4, [2, 7, 9])
    submit.num_output_tokens, submit.prompt_logprobs, submit.stopping.min_tokens = 0, 0, 0
    made = messages.sequence(submit, array("i", range(5)), owner=1, target=Target("a", 1), now_ns=1, now_unix_ns=1)
    made.slot = 0
    assert made.fork_group == ""
    body, _ = messages.step_plan(StepPlan(1, new_sequences=[made]), [common.WorkHeader()])
    (entry,) = body.new_sequences
    assert (entry.HasField("prompt_logprobs"), entry.prompt_logprobs, entry.min_output_tokens) == (True, 0, 0)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    submit = scheduler.Submit(
        num_tokens=1,
        sampling=common.SamplingParams(logit_bias=[common.LogitBias(token_id=50, bias=1.0)]),
        detokenizer=scheduler.DetokenizerTarget(address="a", incarnation=1),
    )
    frames = [memoryview(array("i", [1]).tobytes())]
    with pytest.raises(InvalidRequestError, match="logit_bias names token id 50, which is outside the vocabulary of 50 tokens"):
        messages.check_submit(submit, frames, vocab_size=50)
    assert messages.check_submit(submit, frames, vocab_size=51).tolist() == [1]


@pytest.mark.parametrize(
    "spoil", [lambda body: body.logprobs.pop(), lambda body: body.rows.pop(), lambda body: body.top_token_ids.append(1)]
)
def test_arrays_that_do_not_fit_tell_nothing(spoil: object) -> None:
    body = common.TokenLogprobs(
        rows=[3, 5], num_tokens=[1, 2], num_top=[1, 0], logprobs=[-1.0, -2.0, -3.0], top_token_ids=[4], top_logprobs=[-0.5]
    )
    assert logs_by_row(body)[5].logprobs.tolist() == [-2.0, -3.0]
    spoil(body)  # type: ignore[operator]
    assert logs_by_row(body) == {}
