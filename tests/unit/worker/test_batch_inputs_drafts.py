"""Goal: rows with drafts compute and keep exactly what rows without would have, only sooner."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1.worker_pb2 import NewSequence, StepPlan
from services.worker.batch_inputs import BatchInputs, Limits
from services.worker.drafting.drafter import Drafts
from services.worker.mock_runner import mock_tokens
from services.worker.step_tokens import StepTokens

Plan = Callable[..., StepPlan]


def drafts(**by_slot: list[int]) -> Drafts:
    """`s3=[7, 8]`: two drafts for slot 3."""
    pieces = list(by_slot.values())
    return Drafts(
        slots=np.array([int(name[1:]) for name in by_slot], dtype=np.int64),
        counts=np.array([len(piece) for piece in pieces], dtype=np.int64),
        token_ids=np.array([token for piece in pieces for token in piece], dtype=np.int64),
    )


def start(limits: Limits, plan: Plan, *slots: int, drafts: int = 8, end: int = 0, num_pages: int = 4) -> BatchInputs:
    """Sequences of three tokens, the third sampled and not computed yet."""
    inputs = BatchInputs(limits)
    pages = {slot: list(range(slot * num_pages, (slot + 1) * num_pages)) for slot in slots}
    enter = plan(new=dict.fromkeys(slots, 2), pages=pages, rows=dict.fromkeys(slots, 2), drafts=drafts, end=end)
    step = inputs.lay_out(inputs.take(enter, np.arange(10, 10 + 2 * len(slots), dtype=np.int32)))
    commit(inputs, step, *(30 + slot for slot in slots))
    return inputs


def commit(inputs: BatchInputs, step: object, *token_ids: int, is_finite: list[bool] | None = None) -> StepTokens:
    finite = np.array(is_finite if is_finite is not None else [True] * len(token_ids), dtype=np.bool_)
    return inputs.commit(step, np.array(token_ids, dtype=np.int64), finite)  # type: ignore[arg-type]


def test_drafts_lie_behind_the_last_known_token_and_each_place_samples(limits: Limits, plan: Plan) -> None:
    inputs = start(limits, plan, 0, 1, 2)
    step = inputs.lay_out(inputs.take(StepPlan(row_slots=[2, 0, 1]), None), drafts(s0=[50, 51, 52]))
    assert step.num_decode_rows == 2
    assert step.row_slots.tolist() == [2, 1, 0]
    assert step.row_counts.tolist() == [1, 1, 4]
    assert step.token_ids.tolist() == [32, 31, 30, 50, 51, 52]
    assert step.positions.tolist() == [2, 2, 2, 3, 4, 5]
    assert step.slot_mapping.tolist() == [34, 18, 2, 3, 4, 5]
    # In the plan's order: slot 2, then slot 0 four times, then slot 1.
    assert step.sampled.slots.tolist() == [2, 0, 0, 0, 0, 1]
    assert step.sampled.positions.tolist() == [3, 3, 4, 5, 6, 3]
    assert step.sampled_tokens.tolist() == [0, 2, 3, 4, 5, 1]
    assert step.num_drafts is not None and step.num_drafts.tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    ("sampled", "kept"),
    [
        ([50, 51, 52, 60], [50, 51, 52, 60]),
        ([50, 51, 59, 60], [50, 51, 59]),
        ([50, 58, 52, 60], [50, 58]),
        ([57, 51, 52, 60], [57]),
    ],
    ids=["all right", "third wrong", "second wrong", "first wrong"],
)
def test_tokens_are_kept_up_to_the_first_that_was_not_guessed(
    limits: Limits, plan: Plan, sampled: list[int], kept: list[int]
) -> None:
    inputs = start(limits, plan, 0, 1)
    step = inputs.lay_out(inputs.take(StepPlan(row_slots=[1, 0]), None), drafts(s0=[50, 51, 52]))
    tokens = commit(inputs, step, 70, *sampled)
    assert tokens.slots == [1, 0]
    assert tokens.token_ids == [70, *kept]
    assert tokens.counts == [1, len(kept)]
    assert tokens.num_drafts == [0, 3]
    # The next step computes the token sampled last, and writes over what was computed for wrong drafts.
    step = inputs.lay_out(inputs.take(StepPlan(row_slots=[0, 1]), None))
    assert step.token_ids.tolist() == [kept[-1], 70]
    assert step.positions.tolist() == [2 + len(kept), 3]
    assert step.sampled.positions.tolist() == [3 + len(kept), 4]


@pytest.mark.parametrize(
    ("how", "most"),
    [
        ({"drafts": 3}, 3),
        ({"drafts": 0}, 0),
        # Four known tokens in one page: the next one must still have a place there.
        ({"num_pages": 1}, 0),
        ({"num_pages": 2}, 4),
        # It ends at eight tokens; five may come with this step, and one with the next.
        ({"end": 8}, 3),
        ({"end": 6}, 1),
        ({"end": 5}, 0),
        ({"num_pages": 10, "drafts": 99}, 35),
    ],
    ids=str,
)
def test_drafts_leave_room_for_one_token_more(limits: Limits, plan: Plan, how: dict[str, int], most: int) -> None:
    assert start(limits, plan, 0, **how).draft_room(0) == most


def test_rows_of_prompts_carry_no_drafts(limits: Limits, plan: Plan) -> None:
    inputs = start(limits, plan, 0)
    enter = plan(new={1: 5, 2: 1}, pages={1: [20, 21], 2: [22, 23]}, rows={1: 3, 0: 1, 2: 1}, drafts=4)
    rows = inputs.take(enter, np.arange(6, dtype=np.int32))
    # Slot 2's one token is the last it knows, as a decoding row's is.
    assert rows.has_prompts
    assert [inputs.draft_room(slot) for slot in (0, 2)] == [8, 4]
    commit(inputs, inputs.lay_out(rows), 40, 41)
    assert not inputs.take(StepPlan(row_slots=[1]), None).has_prompts
    assert inputs.draft_room(1) == 0, "one token of a prompt of which another follows"


def test_a_row_that_is_not_finite_anywhere_fails_whole(limits: Limits, plan: Plan) -> None:
    inputs = start(limits, plan, 0, 1)
    step = inputs.lay_out(inputs.take(StepPlan(row_slots=[0, 1]), None), drafts(s0=[50, 51], s1=[60]))
    tokens = commit(inputs, step, 9, 9, 9, 60, 61, is_finite=[True, True, False, True, True])
    assert tokens.failed_slots == [0]
    assert tokens.slots == [1]
    assert tokens.token_ids == [60, 61]
    assert tokens.counts == [2]
    assert inputs.unsettled_pages(0).tolist() == [0, 1, 2, 3]
    assert inputs.take(StepPlan(row_slots=[0]), None).unknown_slots == (0,)


def test_tokens_by_slot() -> None:
    assert list(StepTokens([4, 2, 7], [1, 2, 3])) == [(4, [1]), (2, [2]), (7, [3])]
    assert list(StepTokens([4, 2, 7], [1, 2, 3, 4], [1, 2, 1])) == [(4, [1]), (2, [2, 3]), (7, [4])]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_sequences=st.integers(1, 3))
def test_outputs_are_those_without_drafts(data: st.DataObject, num_sequences: int) -> None:
    """Method: a worker whose next token follows from the last and its place; drafts are right, wrong or too long at random."""
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=40, num_pages=40, page_size=3, vocab_size=5)
    inputs = BatchInputs(limits)
    texts = {slot: [slot] for slot in range(num_sequences)}
    plan = StepPlan(row_slots=list(texts))
    for slot in texts:
        plan.new_sequences.append(NewSequence(slot=slot, num_tokens=1, max_num_drafts=6, max_num_tokens=30))
        plan.page_slots.append(slot)
        plan.num_new_pages.append(10)
        plan.new_pages.extend(range(slot * 10, slot * 10 + 10))
    token_ids: np.ndarray | None = np.array(list(texts), dtype=np.int32)
    for _ in range(6):
        rows = inputs.take(plan, token_ids)
        guesses = {}
        for slot, text in texts.items():
            guess = data.draw(st.lists(st.integers(0, 4), max_size=inputs.draft_room(slot)))
            right = follow(text, len(guess))
            guesses[f"s{slot}"] = right[: (cut := data.draw(st.integers(0, len(guess))))] + guess[cut:]
        guesses = {name: guess for name, guess in guesses.items() if guess}
        step = inputs.lay_out(rows, drafts(**guesses) if guesses else None)
        sampled = mock_tokens(step.token_ids[step.sampled_tokens], step.sampled.positions, limits.vocab_size)
        tokens = inputs.commit(step, sampled, np.ones(len(sampled), dtype=np.bool_))
        for slot, given_tokens in tokens:
            assert given_tokens == follow(texts[slot], len(given_tokens))
            texts[slot] += given_tokens
        plan, token_ids = StepPlan(same_rows=True), None


def follow(text: list[int], num_tokens: int) -> list[int]:
    """The tokens that come next."""
    text = list(text)
    for _ in range(num_tokens):
        text += mock_tokens(np.array(text[-1:]), np.array([len(text)]), 5).tolist()
    return text[len(text) - num_tokens :]
