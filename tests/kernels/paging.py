"""Paged contexts whose every unused place is poisoned: reading a token that is not the row's shows as NaN or as a wrong page."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kernels.comparing import normal, poisoned


@dataclass(frozen=True, slots=True)
class Context:
    """Rows of `lengths` tokens in pages, with their tables."""

    layer_pages: torch.Tensor
    page_tables: torch.Tensor
    lengths: torch.Tensor


def paged(
    lengths: list[int],
    *,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    index_type: torch.dtype = torch.int64,
) -> Context:
    """Fill fresh pages, in random order, with random keys and values of rows of such lengths."""
    counts = [-(-length // page_size) for length in lengths]
    num_pages, width = sum(counts) + 3, max([1, *counts]) + 1
    layer_pages = poisoned(num_pages, page_size, 2, num_kv_heads, head_dim, dtype=dtype)
    order = torch.randperm(num_pages).tolist()
    # Past a row's pages its table names one that is nobody's: all NaN.
    page_tables = torch.full((len(lengths), width), order.pop())
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = [order.pop() for _ in range(count)]
        page_tables[row, :count] = torch.tensor(pages, dtype=torch.int64)
        tokens = normal(count * page_size, 2, num_kv_heads, head_dim, dtype=dtype)
        tokens[length:] = torch.nan
        layer_pages[pages] = tokens.unflatten(0, (count, page_size))
    return Context(layer_pages, page_tables.to(index_type), torch.tensor(lengths, dtype=index_type))
