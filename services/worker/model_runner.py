"""Owns the network and the state of sequences; turns a step plan into a step result.

Plan → `BatchInputs` (arrays) → `StepTensors` → network → logits of the rows that sample → sampler → result. No I/O, no clock, one
thread. See `rank.py` for where plans come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from headrace.v1.common_pb2 import SamplingParams, WorkHeader
from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from services.worker.batch_inputs import BatchInputs, Limits, PlannedRows, StepInputs, page_copies
from services.worker.constraints.masks import LikeliestAllowed, likeliest_allowed
from services.worker.constraints.output_constraints import OutputConstraints
from services.worker.drafting.drafter import Drafts
from services.worker.drafting.speculation import Speculation
from services.worker.entering import entering
from services.worker.layers.ops import Best, Network, StepTensors
from services.worker.logit_adjuster import LogitAdjuster
from services.worker.runner import step_result
from services.worker.sampler import Draw, sample
from services.worker.step_tokens import StepTokens
from services.worker.token_logprobs import LogprobTable, PromptSpan, prompt_indices

_NO_TOKENS: Final = np.zeros(0, dtype=np.int64)
_NO_FLAGS: Final = np.zeros(0, dtype=np.bool_)


class ModelRunner:
    """Computes steps.

    Args:
        network: The model with its pages.
        limits: Sizes; `num_pages` and `page_size` are those of the pages.
        draw: What draws tokens; None for `sampler.draw_tokens`.
        likeliest_allowed: What finds a constrained greedy row's token, for whoever makes the constraints.

    Attributes:
        speculation: Where drafts come from; None for no drafts. Set before the first step.
        constraints: Sees to it that outputs are what they must be; None where nothing is constrained. Set before the first step.
    """

    def __init__(
        self,
        network: Network,
        limits: Limits,
        *,
        draw: Draw | None = None,
        likeliest_allowed: LikeliestAllowed = likeliest_allowed,
    ) -> None:
        self.likeliest_allowed = likeliest_allowed
        self.speculation: Speculation | None = None
        self.constraints: OutputConstraints | None = None
        self._network = network
        self._draw = draw
        self._inputs = BatchInputs(limits)
        self._adjuster = LogitAdjuster(limits.max_num_seqs, limits.vocab_size)
        self._logprobs = LogprobTable(limits.max_num_seqs)

    @property
    def limits(self) -> Limits:
        """Sizes to register with."""
        return self._inputs.limits

    @property
    def num_sequences(self) -> int:
        """Sequences held."""
        return self._inputs.num_sequences

    @property
    def max_num_drafts(self) -> int:
        """Most drafts it verifies in a row; 0 where it does not speculate."""
        return self.speculation.max_num_drafts if self.speculation is not None else 0

    def step(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> StepResult:
        """Compute one plan.

        Args:
            plan: The next plan, in order.
            token_ids: Tokens of the plan's new sequences, one after another; None when it has none.

        Returns:
            The result without its times.

        Raises:
            ProtocolError: The plan contradicts what is held; nothing was computed.
        """
        rows = self._inputs.take(plan, token_ids)
        self._enter(plan, token_ids)
        drafts = self._drafts(plan, token_ids, rows)
        step = self._inputs.lay_out(rows, drafts)
        if plan.copied_pages or plan.page_copies:
            sources, targets = page_copies(plan, self.limits)
            self._network.copy_pages(torch.from_numpy(sources), torch.from_numpy(targets))
        if len(step.token_ids) == 0:
            return step_result(plan, StepTokens(), step.unknown_slots)
        spans = self._logprobs.prompt_spans(step, self._inputs.tokens)
        if not spans and len(step.sampled.slots) == 0:
            return self._extend(plan, step)
        constraints = self.constraints
        with torch.inference_mode():
            logits, best = self._forward(step, spans)
            num_sampled = len(step.sampled.slots)
            kept = self._logprobs.keep(logits, step.sampled)
            # Not before the network has run: a grammar may have been compiled meanwhile.
            is_withheld = constraints.withheld(step.sampled.slots) if constraints is not None else None
            sampled, is_finite = sample(
                logits[:num_sampled], step.sampled, best, (self._adjuster,), masks=constraints, draw=self._draw
            )
            if constraints is not None and constraints.failed_slots:
                is_finite &= ~constraints.has_failed(step.sampled.slots)
            told = self._logprobs.of_sampled(kept, step.sampled, sampled, is_finite)
            told_of_prompts = self._logprobs.of_prompts(logits[num_sampled:], spans)
        is_given = ~is_withheld if is_withheld is not None else slice(None)
        self._adjuster.commit(step.sampled.slots[is_given], sampled[is_given])
        tokens = self._inputs.commit(step, sampled, is_finite, is_withheld)
        self._clear_pages(tokens.failed_slots)
        if self.speculation is not None:
            self.speculation.finish(tokens, num_tokens=len(step.token_ids))
        broken = constraints.failed_slots if constraints is not None else frozenset()
        result = step_result(plan, tokens, step.unknown_slots, broken)
        if constraints is not None:
            result.ended_slots.extend(constraints.commit(tokens))
        if told is not None:
            result.logprobs.CopyFrom(told)
        if told_of_prompts is not None:
            result.prompt_logprobs.CopyFrom(told_of_prompts)
        return result

    def reset(self) -> None:
        """Forget every sequence. Pages keep their content; a page is always written before it is attended to."""
        self._inputs.reset()
        self._adjuster.reset()
        self._logprobs.reset()
        if self.constraints is not None:
            self.constraints.reset()
        if self.speculation is not None:
            self.speculation.reset()

    def warm_up(self) -> None:
        """Run a prefill and a decode over scratch pages, so that no request pays for the first call of each kernel.

        Nothing may be held yet.
        """
        limits = self.limits
        num_tokens = min(limits.max_num_batched_tokens, limits.max_model_len - 1, 2 * limits.page_size + 1)
        num_pages = num_tokens // limits.page_size + 1
        sampling = SamplingParams(temperature=1.0, top_p=0.9, top_k=8, seed=1)
        sequence = NewSequence(slot=0, work=WorkHeader(request_id="warm-up"), num_tokens=num_tokens, sampling=sampling)
        prefill = StepPlan(
            new_sequences=[sequence],
            page_slots=[0],
            num_new_pages=[num_pages],
            new_pages=range(num_pages),
            row_slots=[0],
            row_num_new_tokens=[num_tokens],
        )
        self.step(prefill, np.zeros(num_tokens, dtype=np.int32))
        self.step(StepPlan(row_slots=[0]), None)
        self.reset()

    def _enter(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> None:
        """Some sequences leave with a plan, some enter."""
        if plan.freed_slots:
            self._adjuster.leave(plan.freed_slots)
            if self.constraints is not None:
                self.constraints.leave(plan.freed_slots)
        for sequence, tokens, _ in entering(plan, token_ids):
            if self._inputs.holds(sequence.slot):
                self._adjuster.enter(sequence, tokens)
                self._logprobs.enter(sequence)
                if self.constraints is not None:
                    self.constraints.enter(sequence, tokens)

    def _extend(self, plan: StepPlan, step: StepInputs) -> StepResult:
        """Compute prompts that all go on in a later step: no token is drawn."""
        with torch.inference_mode():
            # It asks for the best, of which there are none, and so waits for a GPU to end.
            self._forward(step, [])
        tokens = self._inputs.commit(step, _NO_TOKENS, _NO_FLAGS)
        if self.speculation is not None:
            self.speculation.finish(tokens, num_tokens=len(step.token_ids))
        return step_result(plan, tokens, step.unknown_slots)

    def _forward(self, step: StepInputs, spans: list[PromptSpan]) -> tuple[torch.Tensor, Best | None]:
        """Logits of the tokens to sample, then of the prompt tokens whose logprobs are wanted; and the best of the former."""
        tensors = self._tensors(step)
        if not spans:
            return self._network.forward(tensors), self._network.best()
        wanted = np.concatenate((step.sampled_tokens, prompt_indices(spans)))
        logits = self._network.forward(replace(tensors, sampled_tokens=torch.from_numpy(wanted)))
        best, num_sampled = self._network.best(), len(step.sampled_tokens)
        return logits, None if best is None else (best[0][:num_sampled], best[1][:num_sampled])

    def _drafts(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None, rows: PlannedRows) -> Drafts | None:
        if self.speculation is None:
            return None
        self.speculation.begin(plan, token_ids)
        num_free = self.limits.max_num_batched_tokens - rows.num_tokens
        return self.speculation.draft(rows, room=self._inputs.draft_room, num_free_tokens=num_free)

    def _tensors(self, step: StepInputs) -> StepTensors:
        return StepTensors(
            token_ids=torch.from_numpy(step.token_ids),
            positions=torch.from_numpy(step.positions),
            slot_mapping=torch.from_numpy(step.slot_mapping),
            row_starts=torch.from_numpy(step.row_starts),
            row_counts=torch.from_numpy(step.row_counts),
            page_tables=torch.from_numpy(self._inputs.page_tables(step.row_slots)),
            num_decode_rows=step.num_decode_rows,
            sampled_tokens=torch.from_numpy(step.sampled_tokens),
        )

    def _clear_pages(self, slots: Sequence[int]) -> None:
        """Wipe the pages of failed rows: a NaN left behind would spoil the page's next owner, even where a mask hides it."""
        for slot in slots:
            self._network.clear_pages(torch.from_numpy(self._inputs.unsettled_pages(slot)))
