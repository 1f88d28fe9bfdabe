"""Attention over paged keys and values in plain torch, for CPUs without native kernels.

Decode rows are computed together: their pages are gathered and the query heads that share a key-value head become rows of one
product (three times faster here than `enable_gqa`). A row is padded to a length that depends on its own length only, and rows of
equal padded length form a group, so what a row computes does not depend on its neighbours: attention is batch-invariant. The
linear layers round it need not be (see `layers/linear.py`).

Extend rows are computed one by one. A row without cached tokens attends over its own keys directly; one with cached tokens
gathers its pages and uses a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from services.worker.layers.ops import AttentionSpec, StepTensors

_PADDED_PAGES_MIN = 4


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows of one padded length: their row indices (None: all, in order), flat pages, and mask `[rows, 1, 1, length]`."""

    rows: torch.Tensor | None
    num_rows: int
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Extend:
    """A row that computes several tokens over what is cached.

    Attributes:
        tokens: Where its tokens lie in the flat step.
        context: Tokens of context, the new ones included.
        pages: int64 `[num_pages]` that hold the context.
        mask: Causal, `[num_new_tokens, context]`; None where nothing is cached.
    """

    tokens: slice
    context: int
    pages: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """What all layers of a step share."""

    slot_mapping: torch.Tensor
    num_decode_rows: int
    groups: tuple[_DecodeGroup, ...]
    extends: tuple[_Extend, ...]


class TorchCpuAttention:
    """The backend.

    Args:
        page_size: Tokens a page.
        dtype: Type of queries, keys and values.
    """

    def __init__(self, *, page_size: int, dtype: torch.dtype) -> None:
        self._page_size = page_size
        self._dtype = dtype

    def prepare(self, step: StepTensors) -> PreparedStep:
        """Group the decode rows by padded length and build the masks."""
        return PreparedStep(
            slot_mapping=step.slot_mapping,
            num_decode_rows=step.num_decode_rows,
            groups=self._groups(step),
            extends=tuple(self._extends(step)),
        )

    def attend(
        self,
        prepared: PreparedStep,
        layer_pages: torch.Tensor,
        queries: torch.Tensor,
        keys_values: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Store, then attend; see `AttentionBackend.attend`."""
        num_tokens, num_heads, head_dim = queries.shape
        num_pages, page_size, _, num_kv_heads, _ = layer_pages.shape
        layer_pages.view(num_pages * page_size, 2, num_kv_heads, head_dim).index_copy_(0, prepared.slot_mapping, keys_values)
        outputs = queries.new_empty((num_tokens, num_heads, head_dim))
        for group in prepared.groups:
            self._decode(group, layer_pages, queries[: prepared.num_decode_rows], outputs, scale=spec.scale)
        for extend in prepared.extends:
            self._extend(extend, layer_pages, queries, keys_values, outputs, scale=spec.scale)
        return outputs.view(num_tokens, num_heads * head_dim)

    def _groups(self, step: StepTensors) -> tuple[_DecodeGroup, ...]:
        if step.num_decode_rows == 0:
            return ()
        lengths = (step.row_starts[: step.num_decode_rows] + 1).tolist()
        rows_by_width: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            rows_by_width.setdefault(padded_pages(-(-length // self._page_size)), []).append(row)
        return tuple(self._group(step, rows, width) for width, rows in sorted(rows_by_width.items()))

    def _group(self, step: StepTensors, row_list: list[int], width: int) -> _DecodeGroup:
        rows = None if len(row_list) == step.num_decode_rows else torch.tensor(row_list)
        selected = slice(step.num_decode_rows) if rows is None else rows
        tables, lengths = step.page_tables[selected], step.row_starts[selected] + 1
        tables = tables[:, :width]
        is_past_end = torch.arange(width * self._page_size) >= lengths.unsqueeze(1)
        mask = torch.zeros(is_past_end.shape, dtype=self._dtype).masked_fill_(is_past_end, -math.inf)
        return _DecodeGroup(rows=rows, num_rows=len(row_list), pages=tables.flatten(), mask=mask[:, None, None, :])

    def _extends(self, step: StepTensors) -> Iterator[_Extend]:
        starts, counts = step.row_starts.tolist(), step.row_counts.tolist()
        first_token = step.num_decode_rows
        for row in range(step.num_decode_rows, len(counts)):
            start, count = starts[row], counts[row]
            pages = step.page_tables[row, : -(-(start + count) // self._page_size)]
            tokens = slice(first_token, first_token + count)
            yield _Extend(tokens=tokens, context=start + count, pages=pages, mask=self._extend_mask(start, count))
            first_token += count

    def _extend_mask(self, num_cached: int, num_new: int) -> torch.Tensor | None:
        if num_cached == 0:
            return None
        context = num_cached + num_new
        allowed = torch.arange(num_cached, context)
        is_future = torch.arange(context) > allowed.unsqueeze(1)
        return torch.zeros(is_future.shape, dtype=self._dtype).masked_fill_(is_future, -math.inf)

    def _decode(
        self, group: _DecodeGroup, layer_pages: torch.Tensor, queries: torch.Tensor, outputs: torch.Tensor, *, scale: float
    ) -> None:
        num_kv_heads, head_dim = layer_pages.shape[3:]
        selected = queries if group.rows is None else queries.index_select(0, group.rows)
        gathered = layer_pages.view(layer_pages.shape[0], -1).index_select(0, group.pages)
        # [rows, length, 2, num_kv_heads, head_dim] → keys and values [rows, num_kv_heads, length, head_dim], without a copy.
        gathered = gathered.view(group.num_rows, -1, 2, num_kv_heads, head_dim)
        keys, values = gathered[:, :, 0].transpose(1, 2), gathered[:, :, 1].transpose(1, 2)
        heads = selected.reshape(group.num_rows, num_kv_heads, -1, head_dim)
        attended = functional.scaled_dot_product_attention(heads, keys, values, attn_mask=group.mask, scale=scale)
        attended = attended.reshape(group.num_rows, -1, head_dim)
        if group.rows is None:
            outputs[: group.num_rows] = attended
        else:
            outputs.index_copy_(0, group.rows, attended)

    def _extend(
        self,
        extend: _Extend,
        layer_pages: torch.Tensor,
        queries: torch.Tensor,
        keys_values: torch.Tensor,
        outputs: torch.Tensor,
        *,
        scale: float,
    ) -> None:
        tokens = extend.tokens
        if extend.mask is None:
            context = keys_values[tokens]
        else:
            pages = layer_pages.index_select(0, extend.pages)
            context = pages.view(-1, *pages.shape[2:])[: extend.context]
        num_repeats = queries.shape[1] // context.shape[2]
        # [tokens, 2, num_kv_heads, head_dim] → keys and values [1, num_heads, tokens, head_dim].
        keys, values = context.permute(1, 2, 0, 3).repeat_interleave(num_repeats, dim=1).unsqueeze(1).unbind(0)
        selected = queries[tokens].transpose(0, 1).unsqueeze(0)
        attended = functional.scaled_dot_product_attention(
            selected, keys, values, attn_mask=extend.mask, is_causal=extend.mask is None, scale=scale
        )
        outputs[tokens] = attended.squeeze(0).transpose(0, 1)


def padded_pages(num_pages: int) -> int:
    """Round a row's pages up to 4, 6, 8, 12, 16, 24 …: at most half as much again, and few different lengths in a batch."""
    if num_pages <= _PADDED_PAGES_MIN:
        return _PADDED_PAGES_MIN
    step: int = 1 << ((num_pages - 1).bit_length() - 2)
    return -(-num_pages // step) * step
