"""Goal: penalties, biases and stop tokens that may not come yet are those of a plain reference, over any life of the slots.

A step is a handful of sequences with made-up logits; the reference keeps each sequence as a list and computes one logit at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1.common_pb2 import LogitBias, SamplingParams
from headrace.v1.worker_pb2 import NewSequence
from services.worker.logit_adjuster import LogitAdjuster
from services.worker.sampling_table import SampledRows

VOCAB = 23
NUM_SLOTS = 5


@dataclass
class Plain:
    """One sequence as the reference has it."""

    prompt: list[int]
    outputs: list[int]
    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    biases: dict[int, float] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)
    min_tokens: int = 0

    def adjusted(self, logits: list[float]) -> list[float]:
        found = []
        for token_id, logit in enumerate(logits):
            value = logit
            if token_id in self.prompt or token_id in self.outputs:
                value = value / self.repetition if value > 0 else value * self.repetition
            count = self.outputs.count(token_id)
            value -= self.frequency * count
            value -= self.presence if count else 0.0
            value += self.biases.get(token_id, 0.0)
            if token_id in self.stops and len(self.outputs) < self.min_tokens:
                value = -math.inf
            found.append(value)
        return found

    def entering(self, slot: int) -> NewSequence:
        sampling = SamplingParams(
            frequency_penalty=self.frequency,
            presence_penalty=self.presence,
            repetition_penalty=self.repetition,
            logit_bias=[LogitBias(token_id=token_id, bias=bias) for token_id, bias in self.biases.items()],
        )
        return NewSequence(
            slot=slot,
            sampling=sampling,
            num_tokens=len(self.prompt) + len(self.outputs),
            num_output_tokens=len(self.outputs),
            min_output_tokens=self.min_tokens,
            stop_token_ids=self.stops,
        )


tokens = st.integers(0, VOCAB - 1)
sequences = st.builds(
    Plain,
    prompt=st.lists(tokens, min_size=1, max_size=8),
    outputs=st.lists(tokens, max_size=6),
    frequency=st.sampled_from([0.0, 0.0, 0.5, -1.25, 2.0]),
    presence=st.sampled_from([0.0, 0.0, 0.75, -2.0]),
    repetition=st.sampled_from([1.0, 1.0, 1.5, 0.5]),
    biases=st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 3.0, 100.0]), max_size=4),
    stops=st.lists(tokens, max_size=3, unique=True),
    min_tokens=st.integers(0, 8),
)


def rows_of(held: dict[int, Plain], slots: list[int]) -> SampledRows:
    positions = [len(held[slot].prompt) + len(held[slot].outputs) for slot in slots]
    ones = np.ones(len(slots), dtype=np.float32)
    return SampledRows(
        slots=np.array(slots, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        temperature=ones,
        top_k=ones.astype(np.int32),
        top_p=ones,
        min_p=ones,
        seeds=ones.astype(np.uint64),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_logits_are_those_of_the_reference_over_any_life_of_the_slots(data: st.DataObject) -> None:
    adjuster = LogitAdjuster(NUM_SLOTS, VOCAB)
    held: dict[int, Plain] = {}
    for _ in range(data.draw(st.integers(2, 6))):
        for slot in data.draw(st.sets(st.integers(0, NUM_SLOTS - 1))):
            adjuster.leave((slot,))
            held.pop(slot, None)
        for slot in data.draw(st.sets(st.integers(0, NUM_SLOTS - 1))):
            held[slot] = data.draw(sequences)
            entering = held[slot].entering(slot)
            adjuster.enter(entering, np.array(held[slot].prompt + held[slot].outputs, dtype=np.int32))
        slots = data.draw(st.permutations(sorted(held)))[: data.draw(st.integers(0, NUM_SLOTS))]
        if not slots:
            continue
        seed = data.draw(st.integers(0, 1000))
        before = torch.randn((len(slots), VOCAB), generator=torch.Generator().manual_seed(seed)) * 4
        after = before.clone()
        changed = adjuster.adjust(after, rows_of(held, slots))
        for row, slot in enumerate(slots):
            expected = torch.tensor(held[slot].adjusted(before[row].tolist()))
            torch.testing.assert_close(after[row], expected, rtol=1e-5, atol=1e-5)
            if row not in changed:
                assert torch.equal(after[row], before[row])
        sampled = np.array([data.draw(tokens) for _ in slots], dtype=np.int64)
        adjuster.commit(np.array(slots, dtype=np.int64), sampled)
        for slot, token_id in zip(slots, sampled.tolist(), strict=True):
            held[slot].outputs.append(token_id)


def test_rows_that_ask_for_nothing_are_untouched_and_reset_forgets() -> None:
    adjuster = LogitAdjuster(NUM_SLOTS, VOCAB)
    plain = Plain([1, 2], [])
    adjuster.enter(plain.entering(0), np.array([1, 2], dtype=np.int32))
    logits = torch.ones((1, VOCAB))
    assert not len(adjuster.adjust(logits, rows_of({0: plain}, [0])))
    wanting = Plain([1, 2], [], repetition=2.0, biases={3: 1.0}, stops=[4], min_tokens=1)
    adjuster.enter(wanting.entering(1), np.array([1, 2], dtype=np.int32))
    assert adjuster.adjust(logits.clone(), rows_of({1: wanting}, [1])).tolist() == [0]
    adjuster.reset()
    assert not len(adjuster.adjust(logits, rows_of({1: wanting}, [1])))
    assert torch.equal(logits, torch.ones((1, VOCAB)))


def test_a_bias_and_a_bar_hold_at_each_of_several_positions_of_a_row() -> None:
    """A row with drafts draws several tokens of one sequence at once, each at its own position."""
    plain = Plain([1], [], biases={7: 2.0}, stops=[9], min_tokens=2)
    adjuster = LogitAdjuster(NUM_SLOTS, VOCAB)
    adjuster.enter(plain.entering(3), np.array([1], dtype=np.int32))
    rows = rows_of({3: plain}, [3, 3, 3])
    rows.positions[:] = [1, 2, 3]
    logits = torch.zeros((3, VOCAB))
    assert adjuster.adjust(logits, rows).tolist() == [0, 1, 2]
    assert logits[:, 7].tolist() == [2.0, 2.0, 2.0]
    assert logits[:, 9].tolist() == [-math.inf, -math.inf, 0.0]


@pytest.mark.parametrize("num_held", [1, 2, 3, 5])
def test_rows_of_counts_grow_with_those_who_want_them(num_held: int) -> None:
    adjuster = LogitAdjuster(NUM_SLOTS, VOCAB)
    held = {slot: Plain([slot], [slot + 1] * (slot + 1), frequency=1.0) for slot in range(num_held)}
    for slot, plain in held.items():
        adjuster.enter(plain.entering(slot), np.array(plain.prompt + plain.outputs, dtype=np.int32))
    logits = torch.zeros((num_held, VOCAB))
    adjuster.adjust(logits, rows_of(held, list(held)))
    for slot in held:
        assert logits[slot, slot + 1] == -(slot + 1)
        assert logits[slot].sum() == -(slot + 1)


def test_rows_widen_with_the_tokens_that_a_sequence_has() -> None:
    vocab, num_steps = 2000, 700
    adjuster = LogitAdjuster(NUM_SLOTS, vocab)
    plain = Plain(list(range(100)), [], frequency=1.0, presence=0.5)
    adjuster.enter(plain.entering(2), np.arange(100, dtype=np.int32))
    # Each token twice, the second time long after the first.
    outputs = np.arange(num_steps) % (num_steps // 2) + 50
    for token_id in outputs:
        adjuster.commit(np.array([2]), np.array([token_id]))
    logits = torch.zeros((1, vocab))
    adjuster.adjust(logits, rows_of({2: plain}, [2]))
    expected = torch.zeros(vocab)
    expected[50 : 50 + num_steps // 2] = -2.5
    assert torch.equal(logits[0], expected)


def test_a_constraint_leads_over_the_fewest_tokens() -> None:
    """Its grammar may allow nothing but the end: barred too, no token would be left."""
    plain = Plain([1], [], stops=[9], min_tokens=2)
    entering = plain.entering(0)
    entering.constrained.num_output_tokens = 0
    adjuster = LogitAdjuster(NUM_SLOTS, VOCAB)
    adjuster.enter(entering, np.array([1], dtype=np.int32))
    assert not len(adjuster.adjust(torch.zeros((1, VOCAB)), rows_of({0: plain}, [0])))
