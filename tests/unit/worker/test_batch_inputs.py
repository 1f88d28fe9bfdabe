"""Goal: a plan becomes exactly the arrays it describes, and one that contradicts the state is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace.errors import ProtocolError
from headrace.v1.worker_pb2 import StepPlan
from services.worker.batch_inputs import BatchInputs, Limits, StepInputs

Plan = Callable[..., StepPlan]


def int32(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


def commit(inputs: BatchInputs, step: StepInputs, *token_ids: int) -> None:
    inputs.commit(step, np.array(token_ids, dtype=np.int64), np.ones(len(token_ids), dtype=np.bool_))


def apply(inputs: BatchInputs, plan: StepPlan, token_ids: Any) -> StepInputs:
    return inputs.lay_out(inputs.take(plan, token_ids))


@pytest.fixture
def inputs(limits: Limits) -> BatchInputs:
    return BatchInputs(limits)


def test_prefill_lays_tokens_over_the_pages_in_table_order(inputs: BatchInputs, plan: Plan) -> None:
    step = apply(inputs, plan(new={2: 6}, pages={2: [9, 3]}, rows={2: 6}), int32(10, 11, 12, 13, 14, 15))
    assert step.token_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert step.slot_mapping.tolist() == [36, 37, 38, 39, 12, 13]
    assert step.sampled.slots.tolist() == [2]
    assert step.sampled.positions.tolist() == [6]
    assert step.sampled_tokens.tolist() == [5]


def test_chunks_sample_only_with_the_last_token(inputs: BatchInputs, plan: Plan) -> None:
    step = apply(inputs, plan(new={0: 5}, pages={0: [0, 1]}, rows={0: 3}), int32(7, 8, 9, 10, 11))
    assert step.sampled.slots.tolist() == []
    commit(inputs, step)
    step = apply(inputs, plan(rows={0: 2}), None)
    assert (step.token_ids.tolist(), step.positions.tolist()) == ([10, 11], [3, 4])
    assert step.sampled_tokens.tolist() == [1]


def test_sampled_token_is_computed_next_without_being_sent(inputs: BatchInputs, plan: Plan) -> None:
    commit(inputs, apply(inputs, plan(new={0: 2}, pages={0: [4]}, rows={0: 2}), int32(1, 2)), 55)
    step = apply(inputs, plan(rows={0: 1}), None)
    assert (step.token_ids.tolist(), step.positions.tolist(), step.slot_mapping.tolist()) == ([55], [2], [18])
    assert step.sampled.positions.tolist() == [3]


def test_same_rows_repeats_the_last_rows_with_one_token_each(inputs: BatchInputs, plan: Plan) -> None:
    first = plan(new={3: 2, 1: 3}, pages={3: [0, 1], 1: [2, 3]}, rows={3: 2, 1: 3})
    commit(inputs, apply(inputs, first, int32(1, 2, 3, 4, 5)), 60, 61)
    for token_id in range(62, 65):
        step = apply(inputs, StepPlan(same_rows=True), None)
        assert step.row_slots.tolist() == [3, 1]
        assert step.row_counts.tolist() == [1, 1]
        commit(inputs, step, token_id, token_id)
    assert step.positions.tolist() == [4, 5]


def test_decode_rows_come_first_and_samples_keep_the_plans_order(inputs: BatchInputs, plan: Plan) -> None:
    commit(inputs, apply(inputs, plan(new={5: 1}, pages={5: [0]}, rows={5: 1}), int32(9)), 20)
    mixed = plan(new={7: 3, 0: 2}, pages={7: [1], 0: [2]}, rows={7: 3, 5: 1, 0: 2})
    step = apply(inputs, mixed, int32(1, 2, 3, 4, 5))
    assert step.num_decode_rows == 1
    assert step.row_slots.tolist() == [5, 7, 0]
    assert step.token_ids.tolist() == [20, 1, 2, 3, 4, 5]
    assert step.sampled.slots.tolist() == [7, 5, 0]
    assert step.sampled_tokens.tolist() == [3, 0, 5]


def test_cached_tokens_are_not_computed(inputs: BatchInputs, plan: Plan) -> None:
    step = apply(inputs, plan(new={0: 6}, pages={0: [8, 9]}, rows={0: 2}, cached=4), int32(1, 2, 3, 4, 5, 6))
    assert (step.token_ids.tolist(), step.positions.tolist(), step.slot_mapping.tolist()) == ([5, 6], [4, 5], [36, 37])
    assert inputs.unsettled_pages(0).tolist() == [9]


def test_page_tables_are_padded_with_the_rows_own_pages(inputs: BatchInputs, plan: Plan) -> None:
    apply(inputs, plan(new={0: 6, 1: 1}, pages={0: [7, 8], 1: [5]}, rows={0: 6, 1: 1}), int32(*range(7)))
    tables = inputs.page_tables(np.array([1, 0]))
    assert tables.shape[1] >= 2 + 1 + 4
    assert set(tables[0].tolist()) == {5}
    assert tables[1, :2].tolist() == [7, 8] and set(tables[1].tolist()) <= {7, 8}


def test_freed_slot_is_given_out_again_in_the_same_plan(inputs: BatchInputs, plan: Plan) -> None:
    commit(inputs, apply(inputs, plan(new={0: 4}, pages={0: [0]}, rows={0: 4}), int32(1, 2, 3, 4)), 50)
    step = apply(inputs, plan(freed=[0], new={0: 2}, pages={0: [6]}, rows={0: 2}), int32(8, 9))
    assert (step.token_ids.tolist(), step.slot_mapping.tolist()) == ([8, 9], [24, 25])
    assert inputs.num_sequences == 1


def test_row_of_an_unknown_slot_fails_alone(inputs: BatchInputs, plan: Plan) -> None:
    step = apply(inputs, plan(new={1: 2}, pages={1: [0]}, rows={4: 1, 1: 2}), int32(3, 4))
    assert step.unknown_slots == (4,)
    assert step.token_ids.tolist() == [3, 4]


@pytest.mark.parametrize(
    "sampling", [{"temperature": float("nan")}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}], ids=str
)
def test_sequence_with_absurd_parameters_is_refused_and_others_go_on(
    inputs: BatchInputs, plan: Plan, sampling: dict[str, float]
) -> None:
    apply(inputs, plan(new={0: 2}, pages={0: [0]}, **sampling), int32(1, 2))
    step = apply(inputs, plan(new={1: 2}, pages={1: [1]}, rows={0: 2, 1: 2}), int32(3, 4))
    assert step.unknown_slots == (0,)
    assert step.sampled.slots.tolist() == [1]


@pytest.mark.parametrize("token_id", [-1, 100])
def test_sequence_with_a_token_outside_the_vocabulary_is_refused(inputs: BatchInputs, plan: Plan, token_id: int) -> None:
    assert apply(inputs, plan(new={0: 2}, pages={0: [0]}, rows={0: 2}), int32(1, token_id)).unknown_slots == (0,)
    apply(inputs, plan(freed=[0]), None)
    assert inputs.num_sequences == 0


def test_foretold_tokens_lie_behind_the_sequences_own(inputs: BatchInputs, plan: Plan) -> None:
    both = plan(new={0: 2, 1: 2}, pages={0: [0], 1: [1]}, rows={0: 2, 1: 2})
    both.new_sequences[0].num_foretold_tokens = 3
    step = apply(inputs, both, int32(1, 2, 7, 8, 9, 3, 4))
    assert step.token_ids.tolist() == [1, 2, 3, 4]
    # One that foretells what is no token is refused, as if it had such a token itself.
    inputs.reset()
    assert apply(inputs, both, int32(1, 2, 7, 100, 9, 3, 4)).unknown_slots == (0,)
    inputs.reset()
    with pytest.raises(ProtocolError, match="have 7 tokens, their frame holds 6"):
        inputs.take(both, int32(1, 2, 7, 8, 9, 3))


def test_failed_row_is_not_computed_again(inputs: BatchInputs, plan: Plan) -> None:
    step = apply(inputs, plan(new={0: 2, 1: 2}, pages={0: [0], 1: [1]}, rows={0: 2, 1: 2}), int32(1, 2, 3, 4))
    inputs.commit(step, np.array([5, 6]), np.array([False, True]))
    step = apply(inputs, StepPlan(same_rows=True), None)
    assert step.unknown_slots == (0,)
    assert step.row_slots.tolist() == [1]


def test_reset_forgets_everything(inputs: BatchInputs, plan: Plan) -> None:
    apply(inputs, plan(new={0: 2}, pages={0: [0]}, rows={0: 2}), int32(1, 2))
    inputs.reset()
    assert inputs.num_sequences == 0
    assert len(apply(inputs, StepPlan(same_rows=True), None).row_slots) == 0


@pytest.mark.parametrize(
    ("values", "token_ids", "message"),
    [
        ({"new": {0: 3}}, (1, 2), "have 3 tokens, their frame holds 2"),
        ({"new": {0: 2}}, (1, 2, 3), "their frame holds 3"),
        ({"new": {8: 2}}, (1, 2), "not below 8"),
        ({"new": {0: 2}, "cached": 2}, (1, 2), "2 of them cached"),
        ({"new": {0: 41}}, range(41), "at most 40"),
        ({"new": {0: 2}, "pages": {0: [32]}}, (1, 2), "page 32 does not exist"),
        ({"new": {0: 2}, "pages": {0: list(range(11))}}, (1, 2), "at most 10"),
        ({"pages": {3: [1]}}, (), "slot 3, which is free"),
        ({"new": {0: 5}, "pages": {0: [0]}, "rows": {0: 5}}, range(5), "has 1 pages"),
        ({"new": {0: 2}, "pages": {0: [0]}, "rows": {0: 3}}, (1, 2), "it knows 2"),
        ({"new": {0: 2}, "pages": {0: [0]}, "rows": {0: 0}}, (1, 2), "compute 0 tokens"),
        ({"rows": {9: 1}}, (), "slots are below 8"),
        ({"freed": [8]}, (), "slots are below 8"),
        ({"rows": {0: 40, 1: 40}}, (), "80 tokens in one step"),
    ],
)
def test_plan_that_contradicts_the_state_is_a_protocol_error(
    inputs: BatchInputs, plan: Plan, values: dict[str, Any], token_ids: Any, message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        apply(inputs, plan(**values), int32(*token_ids))


def test_contradictory_row_arrays_are_protocol_errors(inputs: BatchInputs) -> None:
    for bad in (
        StepPlan(same_rows=True, row_slots=[1]),
        StepPlan(row_slots=[1, 1]),
        StepPlan(row_slots=[1, 2], row_num_new_tokens=[1]),
        StepPlan(page_slots=[1], num_new_pages=[2], new_pages=[1]),
        StepPlan(page_slots=[1], num_new_pages=[], new_pages=[1]),
    ):
        with pytest.raises(ProtocolError):
            apply(inputs, bad, None)


def test_slot_in_use_cannot_be_entered(inputs: BatchInputs, plan: Plan) -> None:
    apply(inputs, plan(new={0: 2}, pages={0: [0]}), int32(1, 2))
    with pytest.raises(ProtocolError, match="slot 0, which is in use"):
        apply(inputs, plan(new={0: 2}), int32(1, 2))


def test_longest_sequence_is_computed_to_its_last_token(inputs: BatchInputs, plan: Plan) -> None:
    step = apply(inputs, plan(new={0: 39}, pages={0: list(range(10))}, rows={0: 39}), int32(*range(39)))
    commit(inputs, step, 1)
    step = apply(inputs, plan(rows={0: 1}), None)
    assert step.positions.tolist() == [39]
    commit(inputs, step, 2)
    with pytest.raises(ProtocolError, match="at most 40"):
        apply(inputs, plan(rows={0: 1}), None)
