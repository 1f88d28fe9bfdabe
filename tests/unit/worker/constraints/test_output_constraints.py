"""Constrained rows beside others, through the runner: a stand-in model that wants the next letter of the alphabet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from headrace.v1.common_pb2 import CONSTRAINT_KIND_GRAMMAR, CONSTRAINT_KIND_REGEX, Constraint
from headrace.v1.scheduler_pb2 import RowError, StepResult
from headrace.v1.worker_pb2 import ConstrainedOutput, StepPlan
from services.worker.batch_inputs import Limits
from services.worker.constraints.masks import likeliest_allowed, mask_row
from services.worker.constraints.output_constraints import OutputConstraints
from services.worker.model_runner import ModelRunner
from tests.unit.worker.constraints.alphabet import EOS, AlphabetGrammars, ids, regex
from tests.unit.worker.test_model_runner import make_runner

MakePlan = Callable[..., StepPlan]


class Bench:
    """A runner, and a plan for sequences whose prompts end with a letter."""

    def __init__(self, limits: Limits, plan: MakePlan) -> None:
        self.runner: ModelRunner = make_runner(limits)[0]
        self.grammars = AlphabetGrammars()
        self.runner.constraints = OutputConstraints(self.grammars, limits.vocab_size)
        self.plan = plan

    def enter(self, prompts: dict[int, str], patterns: dict[int, str], *, num_outputs: int = 0, **how: Any) -> StepResult:
        plan = self.plan(
            new={slot: len(prompt) for slot, prompt in prompts.items()},
            pages={slot: [4 * slot + page for page in range(4)] for slot in prompts},
            rows={slot: len(prompt) for slot, prompt in prompts.items()},
            **how,
        )
        for sequence in plan.new_sequences:
            if sequence.slot in patterns:
                constraint = Constraint(kind=CONSTRAINT_KIND_GRAMMAR, source=regex(patterns[sequence.slot]))
                sequence.constrained.CopyFrom(ConstrainedOutput(constraint=constraint, num_output_tokens=num_outputs))
        return self.step(plan, np.array([token for prompt in prompts.values() for token in ids(prompt)], dtype=np.int32))

    def step(self, plan: StepPlan | None = None, tokens: Any = None) -> StepResult:
        return self.runner.step(plan or StepPlan(same_rows=True), tokens)


@pytest.fixture
def bench(limits: Limits, plan: MakePlan) -> Bench:
    return Bench(limits, plan)


def text(result: StepResult, slot: int) -> str:
    """What a row gave."""
    counts = list(result.num_tokens) or [1] * len(result.slots)
    place = list(result.slots).index(slot)
    start = sum(counts[:place])
    return "".join(chr(32 + token) for token in result.token_ids[start : start + counts[place]])


def test_only_what_the_grammar_allows_is_sampled_and_others_go_on_as_before(bench: Bench) -> None:
    result = bench.enter({0: "a", 1: "a"}, {1: "(x|b)[0-9]{2}"})
    assert (text(result, 0), text(result, 1)) == ("b", "b")
    result = bench.step()
    assert (text(result, 0), text(result, 1)) == ("c", "0"), "the model wants c"
    assert not result.ended_slots
    result = bench.step()
    assert (text(result, 0), text(result, 1)) == ("d", "1")
    assert list(result.ended_slots) == [1], "nothing may follow"
    assert not result.num_tokens


def test_an_end_of_sequence_token_is_allowed_where_the_grammar_may_end(bench: Bench) -> None:
    prompt = chr(32 + EOS - 1)
    first = bench.enter({0: "a" + prompt, 1: "a"}, {0: "0*", 1: "b+"})
    assert first.token_ids[0] == EOS, "the model wants it, and it may come"
    assert list(first.ended_slots) == [0]
    assert text(first, 1) == "b"
    assert text(bench.step(bench.plan(rows={1: 1})), 1) == "b"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampled_row_keeps_to_its_grammar(bench: Bench, temperature: float) -> None:
    bench.enter({0: "a"}, {0: "[m-p]{12}"}, temperature=temperature, top_k=40, top_p=0.9, min_p=0.01)
    found = [text(bench.step(), 0) for _ in range(11)]
    assert set(found) <= set("mnop")


def test_a_row_whose_grammar_is_not_there_gives_nothing_and_holds_up_nobody(bench: Bench) -> None:
    bench.grammars.late.add(regex("[0-9]+"))
    result = bench.enter({0: "a", 1: "a", 2: "a"}, {1: "[0-9]+"})
    assert (text(result, 0), text(result, 1), text(result, 2)) == ("b", "", "b")
    assert list(result.num_tokens) == [1, 0, 1]
    result = bench.step()
    assert (text(result, 0), text(result, 1), text(result, 2)) == ("c", "", "c")
    bench.grammars.late.clear()
    result = bench.step()
    assert (text(result, 0), text(result, 1), text(result, 2)) == ("d", "0", "d")
    assert text(bench.step(), 1) == "1"


def test_a_sequence_that_enters_with_outputs_goes_on_where_they_end(bench: Bench) -> None:
    result = bench.enter({0: "zz12"}, {0: "[0-9]{3}x"}, num_outputs=2)
    assert text(result, 0) == "3"
    assert text(bench.step(), 0) == "x"


def test_a_constraint_that_cannot_be_followed_fails_its_row_alone(bench: Bench) -> None:
    result = bench.enter({0: "a1", 1: "a1", 2: "a1"}, {0: "[0-9", 1: "[a-z]+"}, num_outputs=1)
    assert sorted(result.failed_slots) == [0, 1], "one is no grammar, the other does not allow the outputs there are"
    assert set(result.failed_reasons) == {RowError.ROW_ERROR_CONSTRAINT}
    assert text(result, 2) == "2"


def test_only_grammars_from_a_tokenizer_are_taken(bench: Bench) -> None:
    plan = bench.plan(new={0: 1}, pages={0: [0]}, rows={0: 1})
    constraint = Constraint(kind=CONSTRAINT_KIND_REGEX, source="a")
    plan.new_sequences[0].constrained.CopyFrom(ConstrainedOutput(constraint=constraint))
    result = bench.step(plan, np.array(ids("a"), dtype=np.int32))
    assert list(result.failed_reasons) == [RowError.ROW_ERROR_CONSTRAINT]


def test_a_slot_forgets_its_constraint_with_its_sequence(bench: Bench) -> None:
    assert text(bench.enter({0: "a"}, {0: "[0-9]+"}), 0) == "0"
    result = bench.enter({0: "a"}, {}, freed=[0])
    assert text(result, 0) == "b"
    constraints = bench.runner.constraints
    assert constraints is not None
    assert constraints.num_held == 0
    bench.enter({1: "a"}, {1: "[0-9]+"})
    bench.runner.reset()
    assert constraints.num_held == 0


def test_penalties_count_no_token_that_was_withheld(bench: Bench) -> None:
    bench.grammars.late.add(regex("[bq]+"))
    bench.enter({0: "a"}, {0: "[bq]+"}, frequency_penalty=2.0)
    bench.grammars.late.clear()
    assert text(bench.step(), 0) == "b"


@pytest.mark.parametrize("pattern", ["(x|b)[0-9]{2}", "0*", "b+(c|d)?", "[a-c]{0,3}", ".*"])
def test_a_token_tried_alone_is_allowed_where_its_bit_is_set(pattern: str) -> None:
    """Greedy rows try one token, others take a mask; both must be of one mind, about ends too."""
    random = np.random.default_rng(len(pattern))
    matcher = AlphabetGrammars().find(regex(pattern))
    assert matcher is not None and not isinstance(matcher, str)
    for _ in range(12):
        mask = np.zeros(4, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        allowed = [token for token in range(100) if mask[token // 32] >> (token % 32) & 1]
        assert [token for token in range(100) if matcher.validate_tokens([token]) == 1] == allowed
        assert matcher.consume_tokens([int(random.choice(allowed))])
        if matcher.is_stopped():
            break


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100, 1000])
def test_masks_rule_out_exactly_the_tokens_without_a_bit(vocab_size: int, share: float) -> None:
    random = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(random.standard_normal((4, vocab_size)).astype(np.float32))
    bits = random.random((2, -(-vocab_size // 32) * 32)) < share
    bits[:, 0] = True
    bitmask = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    before = logits.clone()
    for index, mask in ((3, bitmask[0]), (1, bitmask[1])):
        best = likeliest_allowed(logits[index].clone(), mask)
        mask_row(logits[index], mask)
        assert best == logits[index].argmax()
    for row, mask in ((0, None), (2, None), (3, bitmask[0]), (1, bitmask[1])):
        for token in range(vocab_size):
            is_allowed = mask is None or bool(mask[token // 32] >> (token % 32) & 1)
            assert logits[row, token] == (before[row, token] if is_allowed else -torch.inf)


def test_a_mask_wins_over_what_was_ruled_out_before() -> None:
    logits = torch.zeros((1, 40))
    logits[0, 7] = -torch.inf
    bitmask = np.array([[1 << 7, 0]], dtype=np.int32)
    mask_row(logits[0], bitmask[0])
    assert logits[0].argmax() == 7
    assert torch.isfinite(logits[0]).sum() == 1
