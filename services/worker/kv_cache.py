"""Paged keys and values: how many pages the memory holds, and the tensors themselves.

A page holds `page_size` tokens of one sequence in every layer. Keys and values of a token lie side by side:
storing is one copy and gathering is one. Which page belongs to whom is the scheduler's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from headrace.errors import ConfigError

_MARGIN_BYTES_MIN: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PageShape:
    """What decides the size of a page."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return self.num_layers * self.page_size * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes, in bytes. `margin_bytes` is what is left for activations and everything else."""

    weight_bytes: int
    kv_bytes: int
    margin_bytes: int
    num_pages: int


def count_pages(shape: PageShape, *, kv_cache_bytes: int, kv_cache_tokens: int | None, max_model_len: int) -> int:
    """Give the number of pages; needs no weights, so it is asked before they are read.

    Args:
        shape: See `plan_memory`, as for the others.
        kv_cache_bytes: Memory for the pages.
        kv_cache_tokens: Tokens to hold.
        max_model_len: Tokens that one sequence may reach.

    Raises:
        ConfigError: The longest sequence does not fit into the pages.
    """
    num_pages = kv_cache_bytes // shape.num_bytes if kv_cache_tokens is None else -(-kv_cache_tokens // shape.page_size)
    setting = "kv_cache_bytes" if kv_cache_tokens is None else "kv_cache_tokens"
    if num_pages * shape.page_size < max_model_len:
        needed = -(-max_model_len // shape.page_size) * shape.num_bytes
        raise ConfigError(
            f"worker.{setting}: {num_pages} pages of {shape.page_size} tokens do not hold one sequence of model.max_model_len = "
            f"{max_model_len} tokens, which needs {needed} bytes; raise it or lower model.max_model_len",
            param=f"worker.{setting}",
        )
    return num_pages


def plan_memory(
    shape: PageShape,
    *,
    weight_bytes: int,
    available_bytes: int,
    kv_cache_bytes: int,
    kv_cache_tokens: int | None,
    max_model_len: int,
) -> MemoryPlan:
    """Decide the number of pages.

    Args:
        shape: Shape of a page.
        weight_bytes: Size of the loaded weights, for the report.
        available_bytes: Memory that is free after the weights were loaded.
        kv_cache_bytes: Memory for the pages.
        kv_cache_tokens: Tokens to hold; leads over `kv_cache_bytes`.
        max_model_len: Tokens that one sequence may reach; at least one such sequence must fit.

    Raises:
        ConfigError: The pages do not fit into the memory, or the longest sequence does not fit into the pages.
    """
    num_pages = count_pages(shape, kv_cache_bytes=kv_cache_bytes, kv_cache_tokens=kv_cache_tokens, max_model_len=max_model_len)
    setting = "kv_cache_bytes" if kv_cache_tokens is None else "kv_cache_tokens"
    kv_bytes = num_pages * shape.num_bytes
    if kv_bytes + _MARGIN_BYTES_MIN > available_bytes:
        raise ConfigError(
            f"worker.{setting}: {kv_bytes} bytes of KV pages and {_MARGIN_BYTES_MIN} bytes of margin do not fit into the "
            f"{available_bytes} bytes that are free beside the weights; lower it",
            param=f"worker.{setting}",
        )
    return MemoryPlan(weight_bytes=weight_bytes, kv_bytes=kv_bytes, margin_bytes=available_bytes - kv_bytes, num_pages=num_pages)


class KvCache:
    """The tensors: one a layer, `[num_pages, page_size, 2, num_kv_heads, head_dim]`.

    The operating system gives the memory when a page is first written, so a cache that is never filled costs little: numpy asks
    for zeroed memory, where `torch.zeros` would write the zeros. On a GPU it is taken at once.
    """

    def __init__(self, shape: PageShape, *, num_pages: int, device: torch.device | None = None) -> None:
        self.num_pages = num_pages
        self.page_size = shape.page_size
        sizes = (num_pages, shape.page_size, 2, shape.num_kv_heads, shape.head_dim)
        is_host = device is None or device.type == "cpu"
        self.layers: tuple[torch.Tensor, ...] = tuple(
            _lazy_zeros(sizes, shape.dtype) if is_host else torch.zeros(sizes, dtype=shape.dtype, device=device)
            for _ in range(shape.num_layers)
        )


def _lazy_zeros(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    num_bytes = math.prod(sizes) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(sizes)
