"""Attention of one new token a row over a paged context, in plain torch: the definition. See `extend_attention/reference.py`."""

from __future__ import annotations

import torch

from kernels.attention_inputs import Scoring
from kernels.extend_attention.reference import attend, gather


def paged_decode_attention(
    queries: torch.Tensor, layer_pages: torch.Tensor, page_tables: torch.Tensor, lengths: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """Attend each row's one query over its context.

    Args:
        queries: `[num_rows, num_heads, head_dim]`.
        layer_pages: `[num_pages, page_size, 2, num_kv_heads, head_dim]`.
        page_tables: `[num_rows, width]`; entries past a row's context mean nothing.
        lengths: `[num_rows]`, tokens of context, the new one included; 0 is a padded row, which gives 0.
        scoring: How scores are made.

    Returns:
        `[num_rows, num_heads, head_dim]` in the type of the queries.
    """
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        if length > 0:
            keys, values = gather(layer_pages, page_tables[row], length).unbind(1)
            first = max(length - scoring.window, 0) if scoring.window else 0
            is_visible = torch.arange(length)[None, :] >= first
            out[row] = attend(queries[row : row + 1], keys, values, is_visible, scoring)[0]
    return out.to(queries.dtype)
