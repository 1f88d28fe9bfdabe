"""Single steps of one request's state machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ReplicaDeadError,
    RequestAbortedError,
    RequestFailedError,
    UnavailableError,
)
from headrace.v1.common_pb2 import FINISH_REASON_ABORT, FINISH_REASON_ERROR, FINISH_REASON_STOP
from services.router.actions import (
    Action,
    Deliver,
    End,
    SendAbort,
    SendCloseStream,
    SendOpenStream,
    SendRedirect,
    SendSubmit,
    SendTokenize,
    ShareTokens,
)
from services.router.directory import Directory, Instance
from services.router.generation import EncodedPrompt, GenerationRequest, ModelOffer, OutputPiece, TextPrompt
from services.router.open_request import Kind, OpenRequest, Output, Patience, begin_beside, take_vector
from services.router.places import DETOKENIZER, SCHEDULER, TOKENIZER
from services.router.policies.choice import least_loaded

SECOND = 1_000_000_000
PROMPT = EncodedPrompt(np.arange(5, dtype=np.int32))


class Bench:
    """A request, and a directory with instances 10, 11 (tokenizers), 20, 21 (schedulers), 30, 31 (detokenizers)."""

    def __init__(self, *incarnations: int, kind: Kind = Kind.GENERATE, max_moves: int = 8) -> None:
        self.directory = Directory(least_loaded, stuck_after_ns=SECOND)
        for incarnation in incarnations or (10, 11, 20, 21, 30, 31):
            self.add(incarnation)
        self.request = self.another("r", kind=kind, max_moves=max_moves)

    def another(self, request_id: str, *, kind: Kind = Kind.GENERATE, max_moves: int = 8) -> OpenRequest:
        return OpenRequest(
            request_id,
            kind=kind,
            generation=GenerationRequest("m", TextPrompt("hello")),
            stream_id=7,
            deadline_ns=100 * SECOND,
            placement=self.directory,
            patience=Patience(10 * SECOND, 30 * SECOND, 15 * SECOND, SECOND // 5, max_moves),
        )

    def add(self, incarnation: int) -> None:
        role = {1: TOKENIZER, 2: SCHEDULER, 3: DETOKENIZER}[incarnation // 10]
        self.directory.add(Instance(role, incarnation, str(incarnation), "", {"m": ModelOffer("m", 9, 1)}), 0)

    def lose(self, incarnation: int, now_ns: int = SECOND) -> list[Action]:
        self.directory.remove(incarnation)
        return self.request.on_peer_lost(incarnation, now_ns)

    def stream(self, tokens: Sequence[int] = (1, 2, 3)) -> OpenRequest:
        """Bring the request to STREAMING, at 10, 20 and 30, with some output."""
        self.request.advance(SECOND)
        self.request.on_tokenized(10, PROMPT, SECOND)
        for position, token in enumerate(tokens):
            self.request.on_output(30, Output(position, (token,), "x"), SECOND)
        return self.request


def kinds(actions: Sequence[Action]) -> list[type]:
    return [type(action) for action in actions]


def end_error(actions: Sequence[Action]) -> HeadraceError | None:
    ends = [action for action in actions if isinstance(action, End)]
    assert len(ends) == 1
    assert actions[-1] is ends[0]
    return ends[0].error


def test_the_stages_follow_each_other_and_the_stream_is_open_before_the_submit() -> None:
    bench = Bench()
    assert kinds(bench.request.advance(SECOND)) == [SendTokenize]
    actions = bench.request.on_tokenized(10, PROMPT, SECOND)
    assert kinds(actions) == [SendOpenStream, SendSubmit]
    actions = bench.request.on_output(30, Output(0, (1,), "hi"), SECOND)
    assert actions == [Deliver(bench.request, OutputPiece("hi", (1,)))]
    actions = bench.request.on_output(30, Output(1, (2,), "!", FINISH_REASON_STOP), SECOND)
    assert actions == [Deliver(bench.request, OutputPiece("!", (2,), "stop")), End(bench.request, None)]


def test_other_choices_begin_with_the_tokens_of_the_first_and_at_its_scheduler() -> None:
    bench = Bench()
    first = bench.request
    first.fork_group = "r"
    first.advance(SECOND)
    actions = first.on_tokenized(10, PROMPT, SECOND)
    assert kinds(actions) == [SendOpenStream, SendSubmit, ShareTokens]
    assert actions[-1] == ShareTokens(first)
    others = [bench.another(f"r-{index}") for index in (1, 2, 3)]
    for other in others:
        begin_beside(other, first)
        sent = other.advance(SECOND)
        assert kinds(sent) == [SendOpenStream, SendSubmit]
        assert other.places.held[SCHEDULER] == first.places.held[SCHEDULER]
        assert other.encoded is first.encoded
    # The first one's scheduler dies: it moves, and the others after it.
    assert bench.lose(20) == [SendSubmit(first, 21)]
    for other in others:
        assert other.on_peer_lost(20, SECOND) == [SendSubmit(other, 21)]


def test_a_choice_goes_elsewhere_when_its_first_has_ended() -> None:
    bench = Bench()
    first = bench.stream()
    other = bench.another("r-1")
    begin_beside(other, first)
    first.on_output(30, Output(3, (4,), "x", FINISH_REASON_STOP), SECOND)
    assert kinds(other.advance(SECOND)) == [SendOpenStream, SendSubmit]


def test_a_lost_tokenizer_is_replaced() -> None:
    bench = Bench()
    bench.request.advance(SECOND)
    assert bench.lose(10) == [SendTokenize(bench.request, 11)]
    assert bench.request.on_tokenized(10, PROMPT, SECOND) == []


def test_a_lost_scheduler_is_replaced_with_prompt_and_outputs() -> None:
    bench = Bench()
    request = bench.stream()
    assert bench.lose(20) == [SendSubmit(request, 21)]
    assert list(request.output_tokens) == [1, 2, 3]


def test_a_lost_detokenizer_is_replaced_and_the_scheduler_redirected_to_the_next_position() -> None:
    bench = Bench()
    request = bench.stream()
    assert bench.lose(30) == [SendOpenStream(request, 31), SendRedirect(request, 20, 3)]
    assert request.read.num_chars == 3
    assert request.on_output(30, Output(3, (4,), "late"), SECOND) == []


def test_scheduler_and_detokenizer_lost_together_are_both_replaced() -> None:
    bench = Bench()
    request = bench.stream()
    bench.directory.remove(20)
    bench.directory.remove(30)
    actions = [*request.on_peer_lost(20, SECOND), *request.on_peer_lost(30, SECOND)]
    assert {type(action) for action in actions} >= {SendSubmit, SendOpenStream}
    assert request.places.held == {SCHEDULER: 21, DETOKENIZER: 31}


def test_a_gap_is_sent_again_from_where_the_detokenizer_expects() -> None:
    bench = Bench()
    assert bench.stream().on_gap(30, 1) == [SendRedirect(bench.request, 20, 1)]


def test_repeated_output_is_dropped_and_missing_output_reopens_the_stream() -> None:
    bench = Bench()
    request = bench.stream()
    assert request.on_output(30, Output(1, (2,), "x"), SECOND) == []
    actions = request.on_output(30, Output(5, (6,), "x"), SECOND)
    assert actions == [SendOpenStream(request, 30), SendRedirect(request, 20, 3)]
    # What is still on its way from before is no reason to begin once more.
    assert request.on_output(30, Output(6, (7,), "x"), SECOND) == []


def test_replica_dead_is_resubmitted_and_other_refusals_reach_the_client() -> None:
    bench = Bench()
    request = bench.stream()
    assert request.on_refused(SCHEDULER, 20, ReplicaDeadError("lane lost"), SECOND) == [SendAbort("r", 20), SendSubmit(request, 21)]
    refusal = InvalidRequestError("prompt too long")
    actions = request.on_refused(SCHEDULER, 21, refusal, SECOND)
    assert end_error(actions) is refusal
    assert SendCloseStream(7, 30) in actions
    assert SendAbort not in kinds(actions)


def test_the_only_scheduler_gets_the_request_again_after_a_pause() -> None:
    bench = Bench(10, 20, 30)
    request = bench.stream()
    assert request.on_refused(SCHEDULER, 20, ReplicaDeadError("lane lost"), SECOND) == [SendAbort("r", 20)]
    assert request.due_ns() == SECOND + SECOND // 5
    assert request.on_time(SECOND + SECOND // 5) == [SendSubmit(request, 20)]


def test_a_redirect_for_a_request_not_held_any_more_is_resubmitted_and_the_former_holder_told() -> None:
    bench = Bench()
    request = bench.stream()
    bench.lose(30)
    actions = request.on_refused(SCHEDULER, 20, ReplicaDeadError("not held"), SECOND)
    assert actions == [SendAbort("r", 20), SendSubmit(request, 21)]
    assert request.on_refused(SCHEDULER, 20, ReplicaDeadError("not held"), SECOND) == []


def test_a_detokenizer_that_refuses_the_stream_is_left_for_another() -> None:
    bench = Bench()
    request = bench.stream()
    actions = request.on_output(30, Output(0, (), "", FINISH_REASON_ERROR), SECOND)
    assert actions == [SendOpenStream(request, 31), SendRedirect(request, 20, 3)]


def test_an_unknown_model_at_the_scheduler_reaches_the_client() -> None:
    bench = Bench()
    request = bench.stream(())
    error = NotFoundError("no such model", param="model")
    assert end_error(request.on_refused(SCHEDULER, 20, error, SECOND)) is error


def test_an_overloaded_scheduler_is_left_for_another_and_the_client_told_when_there_is_none() -> None:
    bench = Bench()
    request = bench.stream(())
    assert request.on_refused(SCHEDULER, 20, OverloadedError("full"), SECOND) == [SendSubmit(request, 21)]
    bench.directory.remove(20)
    error = OverloadedError("full too", retry_after_s=3)
    assert end_error(request.on_refused(SCHEDULER, 21, error, SECOND)) is error


def test_an_overload_after_output_has_begun_is_waited_out() -> None:
    bench = Bench(10, 20, 30)
    request = bench.stream()
    assert request.on_refused(SCHEDULER, 20, OverloadedError("full"), SECOND) == []
    assert request.on_time(2 * SECOND) == [SendSubmit(request, 20)]


def test_an_endless_overload_ends_the_request() -> None:
    bench = Bench(10, 20, 30, max_moves=2)
    request = bench.stream()
    error = OverloadedError("full")
    for number in range(2, 5):
        actions = request.on_refused(SCHEDULER, 20, error, number * SECOND)
        if number < 4:
            assert request.on_time(number * SECOND + SECOND // 2) == [SendSubmit(request, 20)]
    assert end_error(actions) is error


def test_work_that_cannot_be_sent_takes_back_what_would_have_followed() -> None:
    bench = Bench(10, 20, 30, 31)
    bench.request.advance(SECOND)
    actions = bench.request.on_tokenized(10, PROMPT, SECOND)
    unsent = [action for action in actions if isinstance(action, (SendOpenStream, SendSubmit))]
    again = bench.request.on_unsent(unsent, ReplicaDeadError("gone"), SECOND)
    assert again == [SendOpenStream(bench.request, 31), SendSubmit(bench.request, 20)]


def test_a_redirect_into_a_full_queue_is_tried_again_without_a_second_submit() -> None:
    bench = Bench()
    request = bench.stream()
    redirect = bench.lose(30)[1]
    assert isinstance(redirect, SendRedirect)
    assert request.on_unsent([redirect], OverloadedError("full"), SECOND) == []
    assert request.on_time(2 * SECOND) == [SendRedirect(request, 20, 3)]


def test_a_missing_stage_is_waited_for_and_then_named() -> None:
    bench = Bench(10, 30)
    bench.request.advance(SECOND)
    assert kinds(bench.request.on_tokenized(10, PROMPT, SECOND)) == [SendOpenStream]
    bench.add(20)
    assert bench.request.advance(2 * SECOND) == [SendSubmit(bench.request, 20)]
    assert bench.lose(20, 3 * SECOND) == []
    # Under way already, it waits longer: for a restart and a model's load.
    assert bench.request.on_time(20 * SECOND) == []
    error = end_error(bench.request.on_time(33 * SECOND))
    assert isinstance(error, UnavailableError)
    assert "scheduler" in error.message


def test_a_new_request_waits_less_for_a_missing_stage() -> None:
    bench = Bench(20, 30)
    assert bench.request.advance(SECOND) == []
    error = end_error(bench.request.on_time(11 * SECOND))
    assert isinstance(error, UnavailableError)
    assert "tokenizer" in error.message


def test_the_deadline_ends_the_request_and_frees_both_stages() -> None:
    bench = Bench()
    actions = bench.stream().on_time(100 * SECOND)
    assert isinstance(end_error(actions), DeadlineExceededError)
    assert actions[:2] == [SendAbort("r", 20), SendCloseStream(7, 30)]


def test_an_end_comes_once_and_gives_every_place_back() -> None:
    bench = Bench()
    request = bench.stream()
    assert isinstance(end_error(request.end(RequestAbortedError("gone"))), RequestAbortedError)
    assert request.end(RequestAbortedError("gone")) == []
    assert request.on_output(30, Output(3, (4,), "x"), SECOND) == []
    assert request.on_time(200 * SECOND) == []
    assert all(bench.directory.get(incarnation).num_open == 0 for incarnation in (10, 20, 30))  # type: ignore[union-attr]


def test_silence_is_asked_after() -> None:
    bench = Bench()
    request = bench.stream()
    assert request.on_time(16 * SECOND) == [SendOpenStream(request, 30), SendRedirect(request, 20, 3)]
    assert request.due_ns() == 31 * SECOND


def test_endless_moves_end_in_an_error() -> None:
    bench = Bench(max_moves=3)
    request = bench.stream()
    actions: list[Action] = []
    for _ in range(4):
        actions = request.on_refused(SCHEDULER, request.places.held[SCHEDULER], ReplicaDeadError("dead"), SECOND)
    assert isinstance(end_error(actions), RequestFailedError)


def test_a_stage_that_stays_unavailable_is_told_as_such() -> None:
    bench = Bench(max_moves=1)
    request = bench.stream(())
    error = UnavailableError("no lane")
    assert request.on_refused(SCHEDULER, 20, error, SECOND) == [SendAbort("r", 20), SendSubmit(request, 21)]
    assert end_error(request.on_refused(SCHEDULER, 21, error, SECOND)) is error


def test_an_operators_abort_is_told_to_the_client() -> None:
    actions = Bench().stream().on_output(30, Output(3, (), "", FINISH_REASON_ABORT), SECOND)
    assert isinstance(end_error(actions), RequestAbortedError)


def test_tokenize_and_detokenize_end_with_the_tokenizers_answer() -> None:
    tokenize = Bench(10, kind=Kind.TOKENIZE)
    tokenize.request.advance(SECOND)
    assert tokenize.request.on_tokenized(10, PROMPT, SECOND) == [End(tokenize.request, None)]
    detokenize = Bench(10, kind=Kind.DETOKENIZE)
    detokenize.request.advance(SECOND)
    assert detokenize.request.on_tokenized(10, "hello", SECOND) == [
        Deliver(detokenize.request, OutputPiece("hello", (), "stop")),
        End(detokenize.request, None),
    ]


def test_a_text_to_embed_passes_no_detokenizer_and_ends_with_its_vector() -> None:
    bench = Bench(10, 20, kind=Kind.EMBED)
    assert kinds(bench.request.advance(SECOND)) == [SendTokenize]
    assert kinds(bench.request.on_tokenized(10, PROMPT, SECOND)) == [SendSubmit]
    vector = np.ones(4, dtype=np.float32)
    assert take_vector(bench.request, 21, vector) == [], "of a scheduler that does not hold it"
    deliver, end = take_vector(bench.request, 20, vector)
    assert isinstance(deliver, Deliver)
    assert deliver.piece.vector is vector
    assert end == End(bench.request, None)
    assert take_vector(bench.request, 20, vector) == []


def test_a_text_to_embed_goes_to_another_scheduler_when_its_own_is_lost() -> None:
    bench = Bench(kind=Kind.EMBED)
    bench.request.advance(SECOND)
    bench.request.on_tokenized(10, PROMPT, SECOND)
    assert bench.lose(20) == [SendSubmit(bench.request, 21)]
    assert kinds(take_vector(bench.request, 21, np.ones(4, dtype=np.float32))) == [Deliver, SendAbort, End]


def test_a_text_to_embed_is_asked_for_again_after_a_long_silence() -> None:
    bench = Bench(kind=Kind.EMBED)
    bench.request.advance(SECOND)
    bench.request.on_tokenized(10, PROMPT, SECOND)
    assert bench.request.on_time(15 * SECOND) == []
    assert bench.request.on_time(17 * SECOND) == [SendSubmit(bench.request, 20)]
    assert isinstance(end_error(bench.request.on_time(100 * SECOND)), DeadlineExceededError)
