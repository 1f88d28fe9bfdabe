"""Who is chosen, what is counted, what is missing."""

from __future__ import annotations

from collections import Counter

import pytest

from headrace.errors import InvalidRequestError, NotFoundError, OverloadedError, RequestFailedError, UnavailableError
from services.router.admission import Admission
from services.router.directory import Directory, Instance, Report
from services.router.generation import EmbeddingOffer, ModelOffer, OutputPiece, ToolCallDelta
from services.router.output_buffer import OutputBuffer
from services.router.places import DETOKENIZER, SCHEDULER, TOKENIZER
from services.router.policies.choice import Candidate, least_loaded, round_robin

SECOND = 1_000_000_000
OFFER = ModelOffer("m", 128, 1)


def make(*roles: int, models: tuple[ModelOffer, ...] = (OFFER,)) -> Directory:
    directory = Directory(least_loaded, stuck_after_ns=60 * SECOND)
    for incarnation, role in enumerate(roles, start=1):
        directory.add(Instance(role, incarnation, f"i{incarnation}", "a", {offer.name: offer for offer in models}), 0)
    return directory


def report(*, running: int = 0, steps: int = 0, draining: bool = False, models: tuple[ModelOffer, ...] = (OFFER,)) -> Report:
    return Report(running, 0, steps, 0, 0, draining, models)


def test_work_is_spread_evenly_over_equal_instances() -> None:
    directory = make(TOKENIZER, TOKENIZER, TOKENIZER)
    taken = Counter(directory.take(TOKENIZER, "m", avoid=None) for _ in range(30))
    assert set(taken.values()) == {10}


def test_a_newcomer_gets_work_at_once_but_not_all_of_it() -> None:
    directory = make(TOKENIZER)
    for _ in range(100):
        directory.give_back(directory.take(TOKENIZER, "m", avoid=None) or 0)
    directory.add(Instance(TOKENIZER, 9, "new", "a", {"m": OFFER}), 0)
    taken = Counter()
    for _ in range(10):
        chosen = directory.take(TOKENIZER, "m", avoid=None)
        taken[chosen] += 1
        directory.give_back(chosen or 0)
    assert taken == {1: 5, 9: 5}


def test_reported_load_of_other_routers_counts_and_own_work_is_not_counted_twice() -> None:
    directory = make(SCHEDULER, SCHEDULER)
    assert directory.take(SCHEDULER, "m", avoid=None) == 1
    directory.report(1, report(running=1), 0)
    directory.report(2, report(running=3), 0)
    assert directory.take(SCHEDULER, "m", avoid=None) == 1
    assert directory.take(SCHEDULER, "m", avoid=None) == 1
    assert directory.take(SCHEDULER, "m", avoid=None) == 2


def test_draining_and_wrong_model_and_avoided_instances_get_nothing() -> None:
    directory = make(DETOKENIZER, DETOKENIZER)
    directory.report(1, report(draining=True), 0)
    assert directory.take(DETOKENIZER, "m", avoid=None) == 2
    assert directory.take(DETOKENIZER, "m", avoid=2) is None
    assert directory.take(DETOKENIZER, "other", avoid=None) is None


def test_a_heartbeat_with_a_new_model_says_that_more_can_be_served() -> None:
    directory = make(SCHEDULER, models=())
    assert directory.report(1, report(), 0) is True
    assert directory.report(1, report(), 0) is False


def test_readiness_names_the_missing_stage() -> None:
    assert "tokenizer" in (make(SCHEDULER, DETOKENIZER).not_ready_reason(0) or "")
    assert "scheduler" in (make(TOKENIZER, DETOKENIZER).not_ready_reason(0) or "")
    assert "detokenizer" in (make(TOKENIZER, SCHEDULER).not_ready_reason(0) or "")
    assert make(TOKENIZER, SCHEDULER, DETOKENIZER).not_ready_reason(0) is None


def test_a_scheduler_without_a_lane_is_named_with_its_worker() -> None:
    directory = make(TOKENIZER, SCHEDULER, DETOKENIZER)
    directory.report(2, report(models=()), 0)
    reason = directory.not_ready_reason(0)
    assert reason is not None
    assert "scheduler" in reason
    assert "worker" in reason


def test_a_stage_with_work_and_no_step_is_stuck_and_named() -> None:
    directory = make(TOKENIZER, SCHEDULER, DETOKENIZER)
    directory.report(2, report(running=4, steps=1), 0)
    directory.report(2, report(running=4, steps=1), 61 * SECOND)
    assert "scheduler is stuck" in (directory.not_ready_reason(61 * SECOND) or "")
    directory.report(2, report(running=4, steps=2), 62 * SECOND)
    assert directory.not_ready_reason(62 * SECOND) is None


def test_health_tells_ages_of_every_instance() -> None:
    directory = make(TOKENIZER, SCHEDULER, DETOKENIZER)
    directory.report(2, Report(1, 2, 3, 5 * SECOND, SECOND, False, (OFFER,)), SECOND)
    stages = directory.stages(3 * SECOND, 9 * SECOND)
    scheduler = stages["scheduler"][0]  # type: ignore[index]
    assert scheduler["last_heartbeat_age_s"] == 2.0
    assert scheduler["last_step_age_s"] == 4.0
    assert scheduler["oldest_waiting_age_s"] == 1.0


def test_policies_choose_as_named() -> None:
    candidates = [Candidate(num_open=5, num_taken=1), Candidate(num_open=1, num_taken=9)]
    assert least_loaded(candidates) == 1
    assert round_robin(candidates) == 0


def test_admission_refuses_over_its_limit_with_the_measured_rate() -> None:
    admission = Admission(3)
    for _ in range(3):
        admission.admit(0)
    for number in range(1, 5):
        admission.release(number * 10 * SECOND)
        admission.admit(number * 10 * SECOND)
    with pytest.raises(OverloadedError, match="limit max_open_requests is 3") as caught:
        admission.admit(50 * SECOND)
    assert caught.value.retry_after_s == 10.0


def test_choices_are_counted_one_by_one() -> None:
    admission = Admission(3)
    admission.admit(0, 2)
    with pytest.raises(OverloadedError, match="2 requests are open, this one has 3 choices, the limit max_open_requests is 3"):
        admission.admit(0, 3)
    admission.admit(0)
    admission.release(10 * SECOND, 2)
    assert admission.num_open == 1
    with pytest.raises(OverloadedError) as caught:
        admission.admit(10 * SECOND, 4)
    assert caught.value.retry_after_s == 1.0
    admission.admit(10 * SECOND, 2)


def test_what_many_choices_wait_for_is_the_time_in_which_as_many_end() -> None:
    admission = Admission(10)
    admission.admit(0, 10)
    for number in range(1, 5):
        admission.release(number * 10 * SECOND)
    with pytest.raises(OverloadedError) as caught:
        admission.admit(50 * SECOND, 7)
    assert caught.value.retry_after_s == 30.0, "three more places, one in ten seconds"


def test_output_is_merged_while_the_reader_is_away() -> None:
    buffer = OutputBuffer(100)
    buffer.put(OutputPiece("a", (1,)))
    assert buffer.take(0).text == "a"
    buffer.put(OutputPiece("b", (2,)))
    buffer.put(OutputPiece("c", (3,), "stop"))
    buffer.fail(RequestFailedError("late"))
    piece = buffer.take(0)
    assert (piece.text, piece.token_ids, piece.finish_reason) == ("bc", (2, 3), "stop")
    with pytest.raises(RequestFailedError):
        buffer.take(0)


def test_choices_are_merged_each_by_itself_and_come_in_turn() -> None:
    buffer = OutputBuffer(100)
    for choice, text in [(0, "a"), (1, "x"), (0, "b"), (2, "q")]:
        buffer.put(OutputPiece(text, (ord(text),)), choice)
    assert [buffer.take(0) for _ in range(2)] == [OutputPiece("ab", (97, 98), None, 0), OutputPiece("x", (120,), None, 1)]
    buffer.put(OutputPiece("c", (99,), "stop"), 0)
    assert [buffer.take(0).choice for _ in range(2)] == [2, 0]
    assert not buffer.is_ready
    buffer.put(OutputPiece("12345", ()), 1)
    buffer.put(OutputPiece("x" * 96, ()), 0)
    assert buffer.is_over_limit
    buffer.take(0)
    assert not buffer.is_over_limit


def test_a_reader_that_does_not_come_back_is_stuck_and_unread_output_is_bounded() -> None:
    buffer = OutputBuffer(2)
    assert not buffer.is_reader_stuck(10**12, 1)
    buffer.put(OutputPiece("abc", (1,)))
    assert buffer.is_over_limit
    buffer.take(0)
    assert not buffer.is_over_limit
    assert buffer.is_reader_stuck(30, 30)
    buffer.come_back()
    assert not buffer.is_reader_stuck(60, 30)


def test_a_buffer_runs_parts_of_a_tool_call_together() -> None:
    buffer = OutputBuffer(100)
    buffer.put(OutputPiece("", (1,), reasoning="why", tool_calls=(ToolCallDelta(0, '{"a"', "id0", "f"),)))
    buffer.put(OutputPiece("", (2,), reasoning="?", tool_calls=(ToolCallDelta(0, ": 1}"), ToolCallDelta(1, "", "id1", "g"))))
    piece = buffer.take(0)
    assert piece.reasoning == "why?"
    assert piece.tool_calls == (ToolCallDelta(0, '{"a": 1}', "id0", "f"), ToolCallDelta(1, "", "id1", "g"))
    buffer.put(OutputPiece("", (), tool_calls=(ToolCallDelta(0, "x" * 100),)))
    assert not buffer.is_over_limit
    buffer.put(OutputPiece("", (), reasoning="y"))
    assert buffer.is_over_limit


def test_a_router_that_has_just_started_refuses_no_model_for_good() -> None:
    directory = Directory(least_loaded, stuck_after_ns=SECOND, models_complete_ns=SECOND)
    directory.add(Instance(TOKENIZER, 1, "t", "", {"chat": ModelOffer("chat", 9, 1)}), 0)
    assert directory.resolve_model("chat", 0) == "chat"
    questions: list[tuple[str, bool, type[InvalidRequestError]]] = [
        ("mini", True, NotFoundError), ("", True, InvalidRequestError), ("chat", True, InvalidRequestError)
    ]  # fmt: skip
    for name, embeds, refusal in questions:
        with pytest.raises(UnavailableError, match="more may register"):
            directory.resolve_model(name, SECOND - 1, embeds=embeds)
        with pytest.raises(refusal):
            directory.resolve_model(name, SECOND, embeds=embeds)
    directory.add(Instance(SCHEDULER, 2, "s", "", {"mini": ModelOffer("mini", 9, 1, EmbeddingOffer(8))}), 0)
    assert directory.resolve_model("", 0, embeds=True) == "mini"


def test_models_that_embed_and_models_that_generate_are_not_confused() -> None:
    directory = Directory(least_loaded, stuck_after_ns=SECOND)
    chat, mini = ModelOffer("chat", 9, 1), ModelOffer("mini", 9, 1, EmbeddingOffer(8))
    directory.add(Instance(TOKENIZER, 1, "t", "", {"chat": chat}), 0)
    with pytest.raises(InvalidRequestError, match=r"'chat' generates text and makes no vectors$"):
        directory.resolve_model("", 0, embeds=True)
    directory.add(Instance(SCHEDULER, 2, "s", "", {"chat": chat, "mini": mini}), 0)
    directory.add(Instance(DETOKENIZER, 3, "d", "", {"mini": ModelOffer("mini", 9, 1)}), 0)
    assert (directory.resolve_model("", 0, embeds=True), directory.resolve_model("", 0, embeds=False)) == ("mini", "chat")
    assert directory.resolve_model("mini", 0) == "mini", "its tokens can be asked for"
    assert directory.known_models.embedding_of("mini") == EmbeddingOffer(8), "a stage that knows nothing of vectors changes nothing"
    with pytest.raises(InvalidRequestError, match="'mini' makes vectors and generates no text; those that do: chat"):
        directory.resolve_model("mini", 0, embeds=False)
    with pytest.raises(InvalidRequestError, match="'chat' generates text and makes no vectors; those that do: mini"):
        directory.resolve_model("chat", 0, embeds=True)
    assert directory.resolve_model("", 0) == "chat"
    directory.add(Instance(TOKENIZER, 4, "t2", "", {"other": ModelOffer("other", 9, 1)}), 0)
    with pytest.raises(InvalidRequestError, match="model is required when several are served: chat, other"):
        directory.resolve_model("", 0)
