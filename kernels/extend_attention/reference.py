"""Attention of several new tokens a row over a paged context, in plain torch: the definition.

`out = softmax(cap(scale · q kᵀ)) v` over what a query may see, with `cap(x) = soft_cap · tanh(x / soft_cap)` where there is a soft
cap, and a sink's `exp` added to the denominator where there are sinks. In float64, rounded once. A query that sees nothing gives 0.

Source: grouped heads, Ainslie et al. (2023); paged keys and values, Kwon et al. (2023); soft cap, Gemma 2 (2024); sinks, gpt-oss
(2025); custom masks for token trees, Miao et al., SpecInfer (2023).
"""

from __future__ import annotations

import torch

from kernels.attention_inputs import Scoring, TreeMask


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_visible: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """Attend, without pages.

    Args:
        queries: `[num_queries, num_heads, head_dim]`.
        keys: `[num_keys, num_kv_heads, head_dim]`.
        values: Likewise.
        is_visible: bool `[num_queries, num_keys]`.
        scoring: How scores are made; its window has no part in it here.

    Returns:
        float64 `[num_queries, num_heads, head_dim]`.
    """
    group = queries.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(group, dim=1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) * scoring.scale
    if scoring.soft_cap:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    scores = scores.masked_fill(~is_visible, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, values)


def gather(layer_pages: torch.Tensor, page_table: torch.Tensor, length: int) -> torch.Tensor:
    """Collect a row's keys and values from its pages: `[length, 2, num_kv_heads, head_dim]`."""
    page_size = layer_pages.shape[1]
    slots = torch.arange(length, device=layer_pages.device)
    return layer_pages[page_table.long()[slots // page_size], slots % page_size]


def extend_attention(
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    page_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    scoring: Scoring,
    mask: TreeMask | None = None,
) -> torch.Tensor:
    """Attend each row's new tokens over its cached ones and over the new ones up to each, all of them in the pages.

    Args:
        queries: `[num_tokens, num_heads, head_dim]`, the rows' new tokens one row after another.
        layer_pages: `[num_pages, page_size, 2, num_kv_heads, head_dim]`.
        page_tables: `[num_rows, width]`; entries past a row's context mean nothing.
        query_starts: `[num_rows + 1]`, index of each row's first new token, and one past the last.
        context_lengths: `[num_rows]`, tokens of the row, the new ones included.
        scoring: How scores are made.
        mask: Visibility among new tokens; by default each sees those up to itself.

    Returns:
        `[num_tokens, num_heads, head_dim]` in the type of the queries; 0 for tokens of no row.
    """
    out = torch.zeros(queries.shape, dtype=torch.float64)
    starts = query_starts.tolist()
    for row, (start, end, length) in enumerate(zip(starts, starts[1:], context_lengths.tolist(), strict=False)):
        num_new = end - start
        keys, values = gather(layer_pages, page_tables[row], length).unbind(1)
        key_positions = torch.arange(length)
        positions = torch.arange(length - num_new, length) if mask is None else mask.positions[start:end].long()
        is_visible = key_positions <= positions[:, None]
        if scoring.window:
            is_visible &= key_positions > positions[:, None] - scoring.window
        if mask is not None:
            first = int(mask.starts[row])
            is_visible[:, length - num_new :] = mask.is_visible[first : first + num_new**2].view(num_new, num_new)
        out[start:end] = attend(queries[start:end], keys, values, is_visible, scoring)
    return out.to(queries.dtype)
