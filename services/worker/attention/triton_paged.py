"""Attention over paged keys and values by Triton kernels: decode rows by one, rows of several tokens by another.

What the kernels must know of a step beside its tensors, grids above all, is counted on the host before the step is copied to the
device (`gpu_step.py`), so nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention_inputs import Scoring
from kernels.extend_attention.launch import extend_attention
from kernels.paged_decode_attention.launch import paged_decode_attention
from kernels.store_kv.launch import store_kv
from services.worker.layers.ops import AttentionSpec, StepTensors


@dataclass(frozen=True, slots=True)
class StagedStep(StepTensors):
    """A step on the device. Entries of `page_tables` past a row's pages mean nothing; a slot of -1 is padding.

    Attributes:
        lengths: int64 `[num_rows]`, tokens of each row, the new ones included; 0 is a padded row.
        query_starts: int64 `[num_rows - num_decode_rows + 1]`, where the tokens of rows of several begin,
            from the first of them on.
        max_length: No decode row is longer.
        max_new_tokens: No row computes more tokens; 0 where all are decode rows.
    """

    lengths: torch.Tensor
    query_starts: torch.Tensor
    max_length: int
    max_new_tokens: int


class TritonAttention:
    """The backend; see `AttentionBackend`."""

    def __init__(self) -> None:
        # By layer; a spec lives as long as its model.
        self._scorings: dict[int, Scoring] = {}

    def prepare(self, step: StepTensors) -> StagedStep:
        """See `AttentionBackend.prepare`: steps come prepared."""
        assert isinstance(step, StagedStep)
        return step

    def attend(
        self,
        prepared: StagedStep,
        layer_pages: torch.Tensor,
        queries: torch.Tensor,
        keys_values: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Store, then attend; see `AttentionBackend.attend`."""
        keys, values = keys_values[:, 0], keys_values[:, 1]
        store_kv(keys, values, layer_pages, prepared.slot_mapping)
        outputs = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        scoring, num_decode = self._scoring(spec), prepared.num_decode_rows
        if num_decode:
            paged_decode_attention(
                queries[:num_decode],
                layer_pages,
                prepared.page_tables[:num_decode],
                prepared.lengths[:num_decode],
                scoring=scoring,
                max_length=prepared.max_length,
                out=outputs[:num_decode],
            )
        if prepared.max_new_tokens:
            extend_attention(
                queries[num_decode:],
                layer_pages,
                prepared.page_tables[num_decode:],
                prepared.query_starts,
                prepared.lengths[num_decode:],
                scoring=scoring,
                max_new_tokens=prepared.max_new_tokens,
                out=outputs[num_decode:],
            )
        return outputs.flatten(1)

    def _scoring(self, spec: AttentionSpec) -> Scoring:
        scoring = self._scorings.get(id(spec))
        if scoring is None:
            sinks = None if spec.sinks is None else spec.sinks.float()
            scoring = Scoring(spec.scale, window=spec.window or 0, soft_cap=spec.soft_cap or 0.0, sinks=sinks)
            self._scorings[id(spec)] = scoring
        return scoring
