"""Random histories of one scheduler: whatever happens, in whatever order, the rules hold.

A machine submits, aborts, stops and redirects requests, lets lanes join and die, runs some lanes and not others, loses detokenizers
and moves the clock. After each rule the accounting must close; the fake worker asserts the rules of the step plan; and at the end
every request must have ended exactly once, with exactly the tokens it would have got alone on an endless lane.
"""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ReplicaDeadError,
    RequestFailedError,
    UnavailableError,
)
from services.scheduler.admission import LANES_LOST_MAX
from services.scheduler.policies.registry import POLICIES
from services.scheduler.radix_tree import Eviction
from services.scheduler.sequence import FinishReason
from tests.unit.scheduler import builders
from tests.unit.scheduler.fake_worker import next_token
from tests.unit.scheduler.system import Stream, System

MAX_MODEL_LEN = 40
VOCAB_SIZE = 20
DETOKENIZERS = ["detokenizer-0", "detokenizer-1"]
MS = 1_000_000
# Not known, ordinary, or whatever a machine comes to.
DURATIONS_NS = st.one_of(st.just(0), st.integers(1 * MS, 60 * MS), st.integers(1, 10**13))


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a `System`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_submitted = 0
        self.aborted: set[int] = set()
        self.stopped: set[int] = set()
        self.finals: list[Stream] = []

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        eviction=st.sampled_from(["lru", "lfu", "fifo", "priority", None]),
        run_ahead=st.booleans(),
        has_foresight=st.booleans(),
        mixed_step_target_ns=st.sampled_from([0, 1, 8 * MS]),
        max_num_drafts=st.sampled_from([0, 3]),
        token_ns=st.sampled_from([0, 1 * MS]),
    )
    def begin(self, policy: str, eviction: Eviction | None, max_num_drafts: int, token_ns: int, **how: Any) -> None:
        core = builders.scheduler(max_requests=12, max_tokens=200, policy=policy, eviction=eviction, **how)
        self.system = System(core)
        site = self.system.join(
            builders.capacity(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, num_pages=8, max_num_drafts=max_num_drafts)
        )
        builders.teach_costs(site.lane, token_ns=token_ns)

    @precondition(lambda self: len(self.system.sites) < 3)
    @rule(
        num_pages=st.integers(1, 24),
        page_size=st.sampled_from([1, 3, 4, 16]),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        group=st.sampled_from(["", "together"]),
        copies_pages=st.booleans(),
        max_num_drafts=st.integers(0, 6),
        token_ns=st.sampled_from([0, 1 * MS]),
    )
    def join(self, *, budget: int, token_ns: int, **sizes: Any) -> None:
        site = self.system.join(
            builders.capacity(max_num_batched_tokens=budget, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, **sizes)
        )
        builders.teach_costs(site.lane, token_ns=token_ns)

    @precondition(lambda self: self.system.sites)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.system.lose(data.draw(st.sampled_from(sorted(self.system.sites))))

    @precondition(lambda self: self.system.sites)
    @rule(data=st.data(), is_draining=st.booleans())
    def drain(self, data: st.DataObject, is_draining: bool) -> None:
        self.system.sites[data.draw(st.sampled_from(sorted(self.system.sites)))].lane.is_draining = is_draining

    @rule(
        num_tokens=st.integers(1, MAX_MODEL_LEN + 2),
        num_former=st.integers(0, 5),
        max_tokens=st.one_of(st.none(), st.integers(1, 30)),
        min_tokens=st.integers(0, 10),
        stop=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        detokenizer=st.sampled_from(DETOKENIZERS),
        timeout_ms=st.one_of(st.none(), st.integers(1, 60)),
        owner=st.integers(1, 3),
        family=st.integers(0, 2),
        num_shared=st.integers(0, MAX_MODEL_LEN),
        priority=st.integers(-15, 15),
        namespace=st.sampled_from(["", "", "salt"]),
        num_drafts_asked=st.sampled_from([None, None, 0, 1]),
    )
    def submit(
        self, *, num_tokens: int, num_former: int, family: int, num_shared: int, timeout_ms: int | None, **how: object
    ) -> None:
        self.num_submitted += 1
        # Few first tokens, so that prefixes meet, and a tail of its own, so that they part.
        num_prompt = max(1, num_tokens - num_former)
        num_shared = min(num_shared, num_prompt)
        tokens = array("i", [family] * num_shared + [self.num_submitted % VOCAB_SIZE] * (num_prompt - num_shared))
        num_former = num_tokens - len(tokens)
        for _ in range(num_former):
            tokens.append(next_token(tokens, VOCAB_SIZE))
        core = self.system.core
        deadline_ns = self.system.now_ns + timeout_ms * 1_000_000 if timeout_ms else 0
        request = f"r{self.num_submitted}"
        sequence = builders.sequence(
            core,
            request,
            tokens,
            num_output_tokens=num_former,
            deadline_ns=deadline_ns,
            stream_id=self.num_submitted,
            **how,  # type: ignore[arg-type]
        )
        try:
            self.system.submit(sequence)
        except InvalidRequestError as error:
            assert error.param == "prompt"
        except OverloadedError as error:
            assert error.retry_after_s >= 1
            assert len(core.queue) >= 12 or core.queue.num_tokens + num_tokens > 200

    @rule(
        num_samples=st.integers(2, 4),
        num_tokens=st.integers(1, MAX_MODEL_LEN - 1),
        family=st.integers(0, 2),
        max_tokens=st.integers(1, 8),
        owner=st.integers(1, 3),
        is_group=st.booleans(),
        is_honest=st.booleans(),
    )
    def fork(self, num_samples: int, num_tokens: int, family: int, is_group: bool, is_honest: bool, **how: object) -> None:
        """Several samples of one prompt, as choices of one request or on their own; of a group some may lie about their prompt."""
        how["fork_group"] = f"group-{self.num_submitted}" if is_group else ""
        for index in range(num_samples):
            num_shared = num_tokens if is_honest or not index else num_tokens - 1
            self.submit(
                num_tokens=num_tokens, num_former=0, family=family, num_shared=num_shared, timeout_ms=None, priority=0, **how
            )

    def live(self) -> list[Stream]:
        return [stream for stream in self.system.streams.values() if not stream.num_ends]

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.live()))
        self.aborted.add(stream.sequence.stream_id)
        self.system.core.abort([stream.sequence.request_id, "unknown"], self.system.now_ns)
        self.system.collect()

    @rule(owner=st.integers(1, 3))
    def lose_router(self, owner: int) -> None:
        self.aborted |= {
            s.sequence.stream_id for s in self.system.streams.values() if s.sequence.owner == owner and s.finish is None
        }
        self.system.core.abort_owner(owner, self.system.now_ns)
        self.system.collect()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def find_stop_string(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.live()))
        self.stopped.add(stream.sequence.stream_id)
        self.system.core.stop_streams([stream.sequence.stream_id, 10**9], self.system.now_ns)
        self.system.collect()

    @precondition(lambda self: self.system.streams)
    @rule(data=st.data(), detokenizer=st.sampled_from(DETOKENIZERS), num_back=st.integers(0, 4))
    def redirect(self, data: st.DataObject, detokenizer: str, num_back: int) -> None:
        stream = data.draw(st.sampled_from(list(self.system.streams.values())))
        core = self.system.core
        position = max(0, min(len(stream.tokens), stream.sequence.num_output_tokens) - num_back)
        is_held = not stream.num_ends or core.outbox.kept(stream.sequence.request_id) is not None
        try:
            core.redirect(
                stream.sequence.request_id, core.outbox.target(detokenizer, 7), from_position=position, now_ns=self.system.now_ns
            )
        except ReplicaDeadError:
            assert not is_held
        else:
            assert is_held
        self.system.collect()

    @rule(detokenizer=st.sampled_from(DETOKENIZERS))
    def detokenizer_hangs(self, detokenizer: str) -> None:
        self.system.deaf.add(detokenizer)

    @rule(detokenizer=st.sampled_from(DETOKENIZERS))
    def detokenizer_is_back(self, detokenizer: str) -> None:
        self.system.deaf.discard(detokenizer)
        for target in self.system.core.outbox:
            self.system.flush(target)

    @rule()
    def flush_cache(self) -> None:
        for site in self.system.sites.values():
            site.lane.kv.flush()
            assert site.lane.kv.tree.num_evictable == 0

    @rule()
    def plan(self) -> None:
        self.system.plan_all()

    @precondition(lambda self: self.system.sites)
    @rule(data=st.data(), duration_ns=DURATIONS_NS)
    def result(self, data: st.DataObject, duration_ns: int) -> None:
        site = self.system.sites[data.draw(st.sampled_from(sorted(self.system.sites)))]
        self.system.deliver_result(site, duration_ns=duration_ns)

    @rule(durations_ns=st.lists(DURATIONS_NS, min_size=1, max_size=20))
    def run_some(self, durations_ns: list[int]) -> None:
        for duration_ns in durations_ns:
            for site in self.system.sites.values():
                self.system.deliver_result(site, duration_ns=duration_ns)
            self.system.plan_all()

    @rule(elapsed_ms=st.integers(-20, 40))
    def clock_jumps(self, elapsed_ms: int) -> None:
        self.system.now_ns += elapsed_ms * 1_000_000
        self.system.core.expire(self.system.now_ns)
        self.system.collect()
        deadline_ns = self.system.core.next_deadline_ns()
        assert deadline_ns is None or deadline_ns > self.system.now_ns

    @invariant()
    def accounting_closes(self) -> None:
        self.system.check_accounting()

    @invariant()
    def nobody_ends_twice(self) -> None:
        assert all(stream.num_ends <= 1 for stream in self.system.streams.values())

    def teardown(self) -> None:
        """Bring one lane that can do everything, let all finish, and compare with the output each would have had alone."""
        system = self.system
        for lane_id in sorted(system.sites):
            system.lose(lane_id)
        system.join(builders.capacity(num_pages=64, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_drafts=2))
        for detokenizer in DETOKENIZERS:
            self.detokenizer_is_back(detokenizer)
        system.run()
        system.check_accounting()
        assert system.core.num_requests == 0
        assert system.core.outbox.num_kept == 0
        assert [site.lane.kv.pool.num_used - site.lane.kv.tree.num_evictable for site in system.sites.values()] == [0]
        assert all(not site.worker.held for site in system.sites.values())
        for stream_id, stream in system.streams.items():
            assert stream.num_ends == 1
            self.check_output(stream_id, stream)

    def check_output(self, stream_id: int, stream: Stream) -> None:
        tokens, reason = _alone(stream)
        assert stream.tokens == tokens[: len(stream.tokens)]
        if stream.error_code == RequestFailedError.code:
            assert stream.sequence.num_lanes_lost == LANES_LOST_MAX
        elif stream.error_code is not None:
            assert stream.error_code in {DeadlineExceededError.code, InvalidRequestError.code}
            assert stream.finish is None
        elif stream.finish is not None:
            # A small lane, or one in a row of small ones, may have ended it early for want of pages.
            is_short = len(stream.tokens) < len(tokens)
            assert stream.finish is (FinishReason.LENGTH if is_short else reason)
        else:
            assert stream_id in self.aborted | self.stopped


def _alone(stream: Stream, *, max_model_len: int = MAX_MODEL_LEN, vocab_size: int = VOCAB_SIZE) -> tuple[array[int], FinishReason]:
    """What the request would get alone."""
    sequence = stream.sequence
    tokens = sequence.tokens[: sequence.num_prompt_tokens + stream.num_former]
    limit = sequence.token_limit(max_model_len)
    while len(tokens) < limit:
        token = next_token(tokens, vocab_size)
        tokens.append(token)
        if token in sequence.stopping.stop_token_ids and len(tokens) - sequence.num_prompt_tokens >= sequence.stopping.min_tokens:
            return tokens[sequence.num_prompt_tokens :], FinishReason.STOP
    return tokens[sequence.num_prompt_tokens :], FinishReason.LENGTH


SETTINGS = settings(max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))

SchedulerMachine.TestCase.settings = SETTINGS
TestSchedulerHistories = SchedulerMachine.TestCase


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 12)), min_size=2, max_size=8),
    durations_ns=st.lists(DURATIONS_NS, min_size=1, max_size=30),
    target_ns=st.sampled_from([1, 8 * MS, 30 * MS]),
    page_size=st.sampled_from([1, 3, 16, 64]),
    budget=st.integers(8, 64),
    run_ahead=st.booleans(),
    is_taught=st.booleans(),
)
def test_prompts_beside_decodes_go_on_whatever_steps_take(
    requests: list[tuple[int, int]],
    durations_ns: list[int],
    target_ns: int,
    page_size: int,
    budget: int,
    run_ahead: bool,
    is_taught: bool,
) -> None:
    """Requests come one a step, most prompts longer than the budget; `System` checks every plan."""
    system = System(builders.scheduler(mixed_step_target_ns=target_ns, run_ahead=run_ahead))
    capacity = builders.capacity(page_size=page_size, num_pages=800 // page_size, max_num_batched_tokens=budget, max_model_len=256)
    site = system.join(capacity)
    if is_taught:
        builders.teach_costs(site.lane, token_ns=MS)
    for step in range(1_000):
        if step < len(requests):
            num_tokens, max_tokens = requests[step]
            system.submit(builders.sequence(system.core, f"r{step}", [step] * num_tokens, max_tokens=max_tokens, stream_id=step))
        system.deliver_result(site, duration_ns=durations_ns[step % len(durations_ns)])
        system.plan_all()
        system.check_accounting()
        if step >= len(requests) and not site.results:
            break
    event(f"limited: {system.core.counts.num_limited_steps > 0}")
    assert system.core.num_requests == 0
    assert all(stream.tokens == _alone(stream, max_model_len=256, vocab_size=50)[0] for stream in system.streams.values())


def test_a_scheduler_that_never_had_a_lane_refuses() -> None:
    system = System(builders.scheduler())
    with pytest.raises(UnavailableError, match="no worker"):
        system.submit(builders.sequence(system.core, "r"))
