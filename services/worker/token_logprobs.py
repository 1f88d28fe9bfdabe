"""How likely tokens were: logprobs of sampled tokens and of prompts, from the logits as the network gave them.

They are those of the model's own distribution: no penalty, bias, mask or temperature is in them, so they mean the same whatever a
request asks for. Rows that ask for none cost one comparison.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from headrace.v1.common_pb2 import TokenLogprobs
from headrace.v1.worker_pb2 import NewSequence
from services.worker.batch_inputs import StepInputs
from services.worker.sampling_table import SampledRows

Int64Array = npt.NDArray[np.int64]

_ROWS_AT_ONCE: Final = 32
"""Bounds what is made on the way from logits to logprobs."""


class PromptSpan(NamedTuple):
    """Tokens of a prompt whose logprobs a step gives.

    Attributes:
        slot: Whose.
        first: Flat index, in the step, of the token that comes before the first of them.
        token_ids: The tokens.
    """

    slot: int
    first: int
    token_ids: Int64Array


class LogprobTable:
    """Who asked for logprobs; arrays indexed by slot."""

    def __init__(self, num_slots: int) -> None:
        # Likeliest tokens beside each; -1 of those who did not ask.
        self._num_top = np.full(num_slots, -1, dtype=np.int64)
        self._num_prompt_top = np.full(num_slots, -1, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(num_slots, dtype=np.int64)
        self._has_prompts = False

    def enter(self, sequence: NewSequence) -> None:
        """Note what a new sequence asks for."""
        slot = sequence.slot
        self._num_top[slot] = sequence.logprobs if sequence.HasField("logprobs") else -1
        self._num_prompt_top[slot] = sequence.prompt_logprobs if sequence.HasField("prompt_logprobs") else -1
        self._num_prompt_tokens[slot] = sequence.num_tokens - sequence.num_output_tokens
        self._has_prompts = bool((self._num_prompt_top >= 0).any())

    def reset(self) -> None:
        """Forget every sequence."""
        self._num_top[:] = -1
        self._num_prompt_top[:] = -1
        self._has_prompts = False

    def prompt_spans(self, step: StepInputs, tokens: npt.NDArray[np.int32]) -> list[PromptSpan]:
        """Prompt tokens that a step's rows tell of: the one after each token computed, as far as the prompt goes.

        Args:
            step: What is computed.
            tokens: Known tokens by slot.
        """
        if not self._has_prompts:
            return []
        firsts = np.cumsum(step.row_counts) - step.row_counts
        spans = []
        for row in np.flatnonzero(self._num_prompt_top[step.row_slots] >= 0).tolist():
            slot, start = int(step.row_slots[row]), int(step.row_starts[row])
            end = min(start + int(step.row_counts[row]), int(self._num_prompt_tokens[slot]) - 1)
            if end > start:
                spans.append(PromptSpan(slot, int(firsts[row]), tokens[slot, start + 1 : end + 1].astype(np.int64)))
        return spans

    def keep(self, logits: torch.Tensor, rows: SampledRows) -> tuple[Int64Array, torch.Tensor] | None:
        """Copy the logits that logprobs are wanted of, before they are adjusted; gives them with their rows. None for none."""
        (indices,) = np.nonzero(self._num_top[rows.slots] >= 0)
        return (indices, logits[torch.from_numpy(indices).to(logits.device)]) if len(indices) else None

    def of_sampled(
        self,
        kept: tuple[Int64Array, torch.Tensor] | None,
        rows: SampledRows,
        token_ids: Int64Array,
        is_finite: npt.NDArray[np.bool_],
    ) -> TokenLogprobs | None:
        """Logprobs of sampled tokens, a row each; rows that are not finite are left out."""
        if kept is None:
            return None
        indices, logits = kept
        if not is_finite[indices].all():
            is_good = is_finite[indices]
            indices, logits = indices[is_good], logits[torch.from_numpy(is_good).to(logits.device)]
        slots = rows.slots[indices]
        num_top = self._num_top[slots]
        message = TokenLogprobs(rows=slots.tolist(), num_tokens=[1] * len(slots), num_top=num_top.tolist())
        _add(message, logits, token_ids[indices], num_top)
        return message

    def of_prompts(self, logits: torch.Tensor, spans: list[PromptSpan]) -> TokenLogprobs | None:
        """Logprobs of prompt tokens.

        Args:
            logits: float32 `[num_tokens, vocab_size]`, of the spans behind one another.
            spans: From `prompt_spans`.
        """
        if not spans:
            return None
        slots = [span.slot for span in spans]
        counts = [len(span.token_ids) for span in spans]
        num_top = self._num_prompt_top[slots]
        message = TokenLogprobs(rows=slots, num_tokens=counts, num_top=num_top.tolist())
        _add(message, logits, np.concatenate([span.token_ids for span in spans]), np.repeat(num_top, counts))
        return message


def prompt_indices(spans: list[PromptSpan]) -> Int64Array:
    """Flat indices of the tokens whose logits the spans want."""
    return np.concatenate([span.first + np.arange(len(span.token_ids)) for span in spans])


def _add(message: TokenLogprobs, logits: torch.Tensor, token_ids: Int64Array, num_top: Int64Array) -> None:
    """Append logprobs of tokens, and of the `num_top` likeliest in place of each."""
    for begin in range(0, len(token_ids), _ROWS_AT_ONCE):
        end = begin + _ROWS_AT_ONCE
        some, wanted = logits[begin:end], num_top[begin:end]
        totals = torch.logsumexp(some, dim=-1)
        chosen = some.gather(1, torch.from_numpy(token_ids[begin:end]).to(some.device).unsqueeze(1)).squeeze(1) - totals
        message.logprobs.extend(chosen.tolist())
        most = int(wanted.max())
        if not most:
            continue
        # Among those found, of equals the one with the smaller id comes first.
        top = some.topk(min(most, some.shape[1]), dim=-1)
        values, ids = (top.values - totals.unsqueeze(1)).cpu().numpy(), top.indices.cpu().numpy()
        order = np.lexsort((ids, -values))
        values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
        is_wanted = np.arange(values.shape[1]) < wanted[:, None]
        message.top_logprobs.extend(values[is_wanted].tolist())
        message.top_token_ids.extend(ids[is_wanted].tolist())
