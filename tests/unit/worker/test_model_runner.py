"""Goal: the runner between plan and result. Method: a stand-in model whose logits are chosen by the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from headrace.errors import ProtocolError
from headrace.v1.scheduler_pb2 import RowError
from headrace.v1.worker_pb2 import StepPlan
from services.worker import model_runner
from services.worker.attention.torch_cpu import padded_pages
from services.worker.batch_inputs import Limits
from services.worker.drafting.drafter import Int32Array, Proposal
from services.worker.drafting.speculation import Speculation
from services.worker.kv_cache import KvCache, PageShape
from services.worker.layers.ops import StepTensors
from services.worker.model_runner import ModelRunner

NAN_TOKEN = 13


class StandIn:
    """The next token is the last one plus 1; a sequence that ends in `NAN_TOKEN` leaves NaN in its pages and logits."""

    def __init__(self, kv_cache: KvCache) -> None:
        self._kv_layers = kv_cache.layers

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer_pages in self._kv_layers:
            layer_pages[targets] = layer_pages[sources]

    def best(self) -> None:
        return None

    def clear_pages(self, pages: torch.Tensor) -> None:
        for layer_pages in self._kv_layers:
            layer_pages[pages] = 0

    def forward(self, step: StepTensors) -> torch.Tensor:
        is_spoiled = step.token_ids == NAN_TOKEN
        for layer_pages in self._kv_layers:
            flat = layer_pages.view(-1, *layer_pages.shape[2:])
            flat[step.slot_mapping] = torch.where(is_spoiled, torch.nan, 1.0)[:, None, None, None]
        last = step.token_ids[step.sampled_tokens]
        logits = torch.nn.functional.one_hot((last + 1) % 100, 100).float()
        logits[last == NAN_TOKEN] = torch.nan
        return logits


def make_runner(limits: Limits) -> tuple[ModelRunner, KvCache]:
    shape = PageShape(num_layers=2, num_kv_heads=1, head_dim=2, page_size=limits.page_size, dtype=torch.float32)
    kv_cache = KvCache(shape, num_pages=limits.num_pages)
    return ModelRunner(StandIn(kv_cache), limits), kv_cache


def test_result_holds_one_token_a_sampled_row_in_plan_order(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    runner, _ = make_runner(limits)
    first = plan(new={4: 2, 1: 3, 2: 3}, pages={4: [0], 1: [1], 2: [2]}, rows={4: 2, 1: 2, 2: 3})
    result = runner.step(first, np.array([20, 21, 30, 31, 32, 40, 41, 42], dtype=np.int32))
    assert (list(result.slots), list(result.token_ids)) == ([4, 2], [22, 43])
    result = runner.step(plan(rows={2: 1, 1: 1, 4: 1}), None)
    assert (list(result.slots), list(result.token_ids)) == ([2, 1, 4], [44, 33, 23])


def test_a_step_of_prompts_that_go_on_draws_nothing(
    limits: Limits, plan: Callable[..., StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(limits)
    with monkeypatch.context() as patched:
        patched.setattr(model_runner, "sample", lambda *_, **__: pytest.fail("nothing is to be drawn"))
        first = plan(new={4: 3, 2: 2}, pages={4: [0], 2: [1]}, rows={4: 2, 2: 1})
        result = runner.step(first, np.array([20, 21, 22, 30, 31], dtype=np.int32))
    assert (result.step_id, list(result.slots), list(result.token_ids)) == (first.step_id, [], [])
    result = runner.step(plan(rows={4: 1, 2: 1}), None)
    assert (list(result.slots), list(result.token_ids)) == ([4, 2], [23, 32])


def test_non_finite_row_fails_alone_and_its_pages_are_wiped(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    runner, kv_cache = make_runner(limits)
    first = plan(new={0: 2, 1: 2}, pages={0: [5], 1: [6]}, rows={0: 2, 1: 2})
    result = runner.step(first, np.array([3, NAN_TOKEN, 50, 51], dtype=np.int32))
    assert (list(result.slots), list(result.token_ids)) == ([1], [52])
    assert list(result.failed_slots) == [0]
    assert list(result.failed_reasons) == [RowError.ROW_ERROR_NON_FINITE_LOGITS]
    assert all(bool(torch.isfinite(layer).all()) for layer in kv_cache.layers)
    result = runner.step(StepPlan(same_rows=True), None)
    assert (list(result.slots), list(result.token_ids)) == ([1], [53])
    assert list(result.failed_reasons) == [RowError.ROW_ERROR_UNKNOWN_SLOT]


def test_wiping_leaves_full_pages_that_were_good_before(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    """They may belong to others by now: the scheduler shares them once a good token has come."""
    runner, kv_cache = make_runner(limits)
    size = limits.page_size
    tokens = np.arange(NAN_TOKEN - size, NAN_TOKEN, dtype=np.int32)
    result = runner.step(plan(new={0: size}, pages={0: [5, 6]}, rows={0: size}), tokens)
    assert list(result.token_ids) == [NAN_TOKEN]
    result = runner.step(StepPlan(row_slots=[0]), None)
    assert list(result.failed_slots) == [0]
    for layer in kv_cache.layers:
        assert bool((layer[5] == 1).all())
        assert bool((layer[6] == 0).all())


def test_plan_that_only_frees_is_answered(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    runner, _ = make_runner(limits)
    runner.step(plan(new={0: 2}, pages={0: [0]}, rows={0: 2}), np.array([1, 2], dtype=np.int32))
    result = runner.step(StepPlan(step_id=9, freed_slots=[0]), None)
    assert (result.step_id, len(result.slots), runner.num_sequences) == (9, 0, 0)


def test_warm_up_leaves_nothing_behind(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    runner, _ = make_runner(limits)
    runner.warm_up()
    assert runner.num_sequences == 0
    result = runner.step(plan(new={0: 1}, pages={0: [0]}, rows={0: 1}), np.array([7], dtype=np.int32))
    assert list(result.token_ids) == [8]


def test_padded_pages_cover_the_row_and_waste_less_than_half() -> None:
    widths = [padded_pages(num_pages) for num_pages in range(1, 2000)]
    assert widths == sorted(widths)
    assert all(num_pages <= width <= max(4, num_pages * 3 // 2) for num_pages, width in enumerate(widths, start=1))
    assert len(set(widths)) < 25


def test_pages_are_copied_before_anything_is_computed_and_all_are_read_first(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    """Goal: a fork goes on in a copy of the last page, with the tokens before its own as they were."""
    runner, kv_cache = make_runner(limits)
    runner.step(plan(new={0: 3}, pages={0: [5]}, rows={0: 3}), np.array([1, 2, 3], dtype=np.int32))
    for layer, pages in enumerate(kv_cache.layers):
        pages[5, :3] = torch.arange(3.0)[:, None, None, None] + 10 * layer
        pages[7] = 99.0
    # Slot 1 has the same prompt; page 5 goes to it, and what was in page 7 to page 5's own next owner.
    fork = plan(new={1: 3}, pages={1: [6]}, rows={0: 1, 1: 1}, cached=2)
    fork.copied_pages.extend([5, 7])
    fork.page_copies.extend([6, 5])
    result = runner.step(fork, np.array([1, 2, 3], dtype=np.int32))
    assert (list(result.slots), list(result.token_ids)) == ([0, 1], [5, 4])
    for layer, pages in enumerate(kv_cache.layers):
        # Of page 6 the third token was computed here, of page 5 the fourth.
        assert pages[6, :, 0, 0, 0].tolist() == [10.0 * layer, 1 + 10.0 * layer, 1.0, 0.0]
        assert pages[5, :, 0, 0, 0].tolist() == [99.0, 99.0, 99.0, 1.0]


def test_copies_that_make_no_sense_are_refused(limits: Limits) -> None:
    runner, _ = make_runner(limits)
    for copied, copies in ([[0], []], [[0, 1], [2, 2]], [[0], [limits.num_pages]], [[limits.num_pages], [0]]):
        with pytest.raises(ProtocolError, match=r"step plan: .* cop"):
            runner.step(StepPlan(copied_pages=copied, page_copies=copies), None)


class Guess:
    """Proposes what it is told, for every row."""

    first_rates = (0.5,)

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = list(token_ids)

    def enter(self, slot: int, token_ids: Int32Array, foretold: Int32Array) -> None:
        """It knows nothing of sequences."""

    def extend(self, slot: int, token_ids: list[int]) -> None:
        """It knows nothing of sequences."""

    def propose(self, slots: Sequence[int], max_num_drafts: int) -> list[Proposal | None]:
        return [Proposal(self.token_ids[:max_num_drafts], 0) for _ in slots]

    def reset(self) -> None:
        """It knows nothing of sequences."""


def make_guesser(limits: Limits, *token_ids: int) -> tuple[ModelRunner, KvCache]:
    runner, kv_cache = make_runner(limits)
    runner.speculation = Speculation(Guess(*token_ids), max_num_drafts=4, is_adaptive=False, now_ns=lambda: 0)
    return runner, kv_cache


def test_right_guesses_come_back_with_one_token_more(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    runner, _ = make_guesser(limits, 24, 25, 99)
    assert runner.max_num_drafts == 4
    enter = plan(new={3: 2, 1: 2}, pages={3: [0, 1, 2], 1: [3, 4, 5]}, rows={3: 2, 1: 2}, drafts=4)
    result = runner.step(enter, np.array([20, 22, 50, 51], dtype=np.int32))
    # A prompt's step carries no drafts, and its counts are not sent.
    assert (list(result.token_ids), list(result.num_tokens), list(result.num_drafts)) == ([23, 52], [], [])
    result = runner.step(StepPlan(same_rows=True), None)
    assert list(result.slots) == [3, 1]
    assert list(result.token_ids) == [24, 25, 26, 53]
    assert (list(result.num_tokens), list(result.num_drafts)) == ([3, 1], [3, 3])
    result = runner.step(StepPlan(same_rows=True), None)
    assert (list(result.token_ids), list(result.num_tokens), list(result.num_drafts)) == ([27, 54], [], [3, 3])


def test_guesses_fit_the_step_they_are_in(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    small = dataclasses.replace(limits, max_num_batched_tokens=5)
    runner, _ = make_guesser(small, 24, 25, 26)
    runner.step(
        plan(new={0: 1, 1: 1}, pages={0: [0, 1, 2], 1: [3, 4, 5]}, rows={0: 1, 1: 1}, drafts=4), np.array([21, 22], dtype=np.int32)
    )
    result = runner.step(StepPlan(same_rows=True), None)
    assert list(result.num_drafts) == [3, 0]


def test_a_guess_that_spoils_its_row_fails_it_and_leaves_nothing_behind(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    """The model would not have gone there; but what it left there would spoil the sequence's next tokens unseen."""
    runner, kv_cache = make_guesser(limits, NAN_TOKEN)
    enter = plan(new={0: 2, 1: 2}, pages={0: [0, 1], 1: [2, 3]}, rows={0: 2, 1: 2}, drafts=4)
    runner.step(enter, np.array([20, 22, 50, 51], dtype=np.int32))
    result = runner.step(StepPlan(row_slots=[0, 1]), None)
    assert (list(result.slots), sorted(result.failed_slots)) == ([], [0, 1])
    assert all(bool(torch.isfinite(layer).all()) for layer in kv_cache.layers)
