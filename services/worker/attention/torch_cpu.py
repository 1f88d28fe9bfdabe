"""Attention over paged keys and values in plain torch, for CPUs without native kernels.

Decode rows are computed together: their pages are gathered and the query heads that share a key-value head become rows of one
product (three times faster here than `enable_gqa`). A row is padded to a length that depends on its own length only, and rows of
equal padded length form a group, so what a row computes does not depend on its neighbours: attention is batch-invariant. The
linear layers round it need not be (see `layers/linear.py`).

Pages of 8 bits hold keys and values as float8 codes without scales of their own: their magnitudes lie within its range. What a
step adds is rounded before anything attends to it, so chunks, batches and preemption change nothing.

Extend rows are computed one by one. A row without cached tokens attends over its own keys directly; one with cached tokens
gathers its pages and uses a mask.

Layers with a window gather only the pages that it reaches. What a step's layers share depends on their window, and is prepared once
for each.
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
        pages: int64 `[num_pages]` that hold the tokens attended to; None where those are the new ones alone.
        num_keys: Tokens from the first of these pages on, the new ones included.
        mask: `[num_new_tokens, num_keys]`; None where each new token attends to all before it.
    """

    tokens: slice
    pages: torch.Tensor | None
    num_keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Rows:
    """A step's rows as layers of one window see them."""

    groups: tuple[_DecodeGroup, ...]
    extends: tuple[_Extend, ...]


class PreparedStep:
    """What all layers of a step share; made when the first layer asks.

    Args:
        step: The step.
        page_size: Tokens a page.
        dtype: Type of the masks, that of queries and keys.
    """

    def __init__(self, step: StepTensors, *, page_size: int, dtype: torch.dtype) -> None:
        self.slot_mapping = step.slot_mapping
        self.num_decode_rows = step.num_decode_rows
        self._step = step
        self._page_size = page_size
        self._dtype = dtype
        self._rows_by_window: dict[int | None, _Rows] = {}

    def rows(self, window: int | None) -> _Rows:
        """Give the rows for layers of a window, in tokens; None for those that attend to all before."""
        rows = self._rows_by_window.get(window)
        if rows is None:
            rows = self._rows_by_window[window] = _Rows(tuple(self._groups(window)), tuple(self._extends(window)))
        return rows

    def _groups(self, window: int | None) -> Iterator[_DecodeGroup]:
        if self.num_decode_rows == 0:
            return
        lengths = self._step.row_starts[: self.num_decode_rows] + 1
        first_keys = None if window is None else (lengths - window).clamp_(min=0)
        rows_by_width: dict[int, list[int]] = {}
        for row, length in enumerate(lengths.tolist()):
            first_page = 0 if window is None else max(0, length - window) // self._page_size
            rows_by_width.setdefault(padded_pages(-(-length // self._page_size) - first_page), []).append(row)
        for width, row_list in sorted(rows_by_width.items()):
            rows = None if len(row_list) == self.num_decode_rows else torch.tensor(row_list)
            selected = slice(self.num_decode_rows) if rows is None else rows
            firsts = None if first_keys is None else first_keys[selected].unsqueeze(1)
            yield self._group(rows, len(row_list), width, lengths[selected].unsqueeze(1), firsts)

    def _group(
        self, rows: torch.Tensor | None, num_rows: int, width: int, lengths: torch.Tensor, first_keys: torch.Tensor | None
    ) -> _DecodeGroup:
        """Make the group of rows of one width, in pages; `lengths` and `first_keys` are `[num_rows, 1]`."""
        tables = self._step.page_tables[: self.num_decode_rows] if rows is None else self._step.page_tables[rows]
        positions = torch.arange(width * self._page_size)
        if first_keys is None:
            pages, is_hidden = tables[:, :width], positions >= lengths
        else:
            first_pages = first_keys // self._page_size
            pages = tables.gather(1, first_pages + torch.arange(width))
            positions = first_pages * self._page_size + positions
            is_hidden = (positions >= lengths) | (positions < first_keys)
        return _DecodeGroup(rows, num_rows, pages.flatten(), _mask(is_hidden, self._dtype)[:, None, None, :])

    def _extends(self, window: int | None) -> Iterator[_Extend]:
        starts, counts = self._step.row_starts.tolist(), self._step.row_counts.tolist()
        first_token = self.num_decode_rows
        for row in range(self.num_decode_rows, len(counts)):
            yield self._extend(row, starts[row], slice(first_token, first_token + counts[row]), window)
            first_token += counts[row]

    def _extend(self, row: int, start: int, tokens: slice, window: int | None) -> _Extend:
        count = tokens.stop - tokens.start
        end = start + count
        if start == 0 and (window is None or count <= window):
            return _Extend(tokens, pages=None, num_keys=count, mask=None)
        first_page = 0 if window is None else max(0, start + 1 - window) // self._page_size
        first_key = first_page * self._page_size
        keys, queries = torch.arange(first_key, end), torch.arange(start, end).unsqueeze(1)
        is_hidden = keys > queries
        if window is not None:
            is_hidden |= keys <= queries - window
        pages = self._step.page_tables[row, first_page : -(-end // self._page_size)] if start else None
        return _Extend(tokens, pages, num_keys=end - first_key, mask=_mask(is_hidden, self._dtype))


class TorchCpuAttention:
    """The backend.

    Args:
        page_size: Tokens a page.
        dtype: Type of queries, keys and values.
        kv_format: 8-bit type as which the pages' bytes are read; None for pages of `dtype`.
    """

    def __init__(self, *, page_size: int, dtype: torch.dtype, kv_format: torch.dtype | None = None) -> None:
        self._page_size = page_size
        self._dtype = dtype
        self._kv_format = kv_format

    def prepare(self, step: StepTensors) -> PreparedStep:
        """See `AttentionBackend.prepare`."""
        return PreparedStep(step, page_size=self._page_size, dtype=self._dtype)

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
        stored = keys_values
        if self._kv_format is not None:
            stored = _as_codes(keys_values, self._kv_format)
            keys_values = self._read(stored)
        layer_pages.view(num_pages * page_size, 2, num_kv_heads, head_dim).index_copy_(0, prepared.slot_mapping, stored)
        outputs = queries.new_empty((num_tokens, num_heads, head_dim))
        rows = prepared.rows(spec.window)
        for group in rows.groups:
            self._decode(group, layer_pages, queries[: prepared.num_decode_rows], outputs, spec)
        for extend in rows.extends:
            self._extend(extend, layer_pages, queries, keys_values, outputs, spec)
        return outputs.view(num_tokens, num_heads * head_dim)

    def _read(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages, or parts of them, as keys and values to compute with."""
        return pages if self._kv_format is None else pages.view(self._kv_format).to(self._dtype)

    def _decode(
        self, group: _DecodeGroup, layer_pages: torch.Tensor, queries: torch.Tensor, outputs: torch.Tensor, spec: AttentionSpec
    ) -> None:
        num_kv_heads, head_dim = layer_pages.shape[3:]
        selected = queries if group.rows is None else queries.index_select(0, group.rows)
        gathered = self._read(layer_pages.view(layer_pages.shape[0], -1).index_select(0, group.pages))
        # [rows, length, 2, num_kv_heads, head_dim] → keys and values [rows, num_kv_heads, length, head_dim], without a copy.
        gathered = gathered.view(group.num_rows, -1, 2, num_kv_heads, head_dim)
        keys, values = gathered[:, :, 0].transpose(1, 2), gathered[:, :, 1].transpose(1, 2)
        heads = selected.reshape(group.num_rows, num_kv_heads, -1, head_dim)
        if spec.sinks is None and spec.soft_cap is None:
            attended = functional.scaled_dot_product_attention(heads, keys, values, attn_mask=group.mask, scale=spec.scale)
        else:
            sinks = None if spec.sinks is None else spec.sinks.view(1, num_kv_heads, -1, 1)
            # Products over a batch of matrices are summed in an order that depends on how many there are.
            parts = zip(heads.split(1), keys.split(1), values.split(1), group.mask.split(1), strict=True)
            attended = torch.cat([_attend(*part, sinks, spec) for part in parts])
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
        spec: AttentionSpec,
    ) -> None:
        tokens = extend.tokens
        if extend.pages is None:
            context = keys_values[tokens]
        else:
            pages = self._read(layer_pages.index_select(0, extend.pages))
            context = pages.view(-1, *pages.shape[2:])[: extend.num_keys]
        num_repeats = queries.shape[1] // context.shape[2]
        # [tokens, 2, num_kv_heads, head_dim] → keys and values [1, num_heads, tokens, head_dim].
        keys, values = context.permute(1, 2, 0, 3).repeat_interleave(num_repeats, dim=1).unsqueeze(1).unbind(0)
        selected = queries[tokens].transpose(0, 1).unsqueeze(0)
        if spec.sinks is None and spec.soft_cap is None:
            attended = functional.scaled_dot_product_attention(
                selected, keys, values, attn_mask=extend.mask, is_causal=extend.mask is None, scale=spec.scale
            )
        else:
            sinks = None if spec.sinks is None else spec.sinks.view(1, -1, 1, 1)
            attended = _attend(selected, keys, values, extend.mask, sinks, spec)
        outputs[tokens] = attended.squeeze(0).transpose(0, 1)


def _as_codes(keys_values: torch.Tensor, kv_format: torch.dtype) -> torch.Tensor:
    """Round to the nearest value of an 8-bit type, as bytes; what is out of its range becomes its largest, what is infinite NaN.

    So a row that fails shows it when later ones attend to what it has left.
    """
    largest = torch.finfo(kv_format).max
    numbers = keys_values.float()
    numbers = numbers.masked_fill(numbers.isinf(), math.nan)
    return numbers.clamp_(-largest, largest).to(kv_format).view(torch.uint8)


def _mask(is_hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(is_hidden.shape, dtype=dtype).masked_fill_(is_hidden, -math.inf)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attend step by step, where torch has no one call for it: with a soft cap or sinks.

    Args:
        queries: `[…, num_queries, head_dim]`.
        keys: `[…, num_keys, head_dim]`.
        values: The same shape.
        mask: Added to the scores; None where each query attends to the keys up to its own index.
        sinks: As wide as the scores, but for their last dimension, which is 1.
        spec: The layer.
    """
    scores = (queries.float() @ keys.float().transpose(-1, -2)).mul_(spec.scale)
    if spec.soft_cap is not None:
        scores.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    if mask is None:
        mask = _mask(torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1), torch.float32)
    scores += mask
    if sinks is not None:
        # One key more, that takes its part of the weight and gives nothing.
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[-2]]
    return weights.to(values.dtype) @ values


def padded_pages(num_pages: int) -> int:
    """Round a row's pages up to 4, 6, 8, 12, 16, 24 …: at most half as much again, and few different lengths in a batch."""
    if num_pages <= _PADDED_PAGES_MIN:
        return _PADDED_PAGES_MIN
    step: int = 1 << ((num_pages - 1).bit_length() - 2)
    return -(-num_pages // step) * step
