"""What the attention ops take beside their tensors, its limits, and the checks that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kernels.launching import FLOAT_TYPES, INDEX_TYPES, Arguments, next_power_of_2

HEAD_DIM_MAX: Final = 256
PAGE_SIZE_MAX: Final = 64
GROUP_MAX: Final = 128
"""Query heads that may share a key-value head."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a model's scores are made.

    Attributes:
        scale: Factor of the product of query and key, above 0.
        window: Tokens a query sees, itself included; 0 is all.
        soft_cap: Bound of the scores, by a hyperbolic tangent; 0 is none.
        sinks: float32 `[num_heads]`, whose exponentials are added to the denominators, or None.
    """

    scale: float
    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TreeMask:
    """Which of a row's new tokens each of its new tokens sees, instead of those before it.

    Attributes:
        is_visible: bool, flat: for each row `num_new * num_new`, a query after the other.
        starts: int32 or int64 `[num_rows]`, where each row's part begins.
        positions: int32 or int64 `[num_tokens]`, each new token's position, which the window over cached tokens is counted from.
    """

    is_visible: torch.Tensor
    starts: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads and pages, as far as the kernels are compiled for them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def block_d(self) -> int:
        """Head size as a power of 2, 16 at least: what a matrix unit takes."""
        return max(next_power_of_2(self.head_dim), 16)


def check_shape(arguments: Arguments, shape: HeadShape) -> None:
    """Check what no kernel is compiled for; a worker asks at its start.

    Raises:
        KernelArgumentError: The head size, the page size or the grouping is out of range.
    """
    arguments.require(1 <= shape.head_dim <= HEAD_DIM_MAX, "head_dim", f"1 to {HEAD_DIM_MAX}", shape.head_dim)
    arguments.require(1 <= shape.page_size <= PAGE_SIZE_MAX, "page_size", f"1 to {PAGE_SIZE_MAX}", shape.page_size)
    is_whole = shape.num_kv_heads > 0 and shape.num_heads % shape.num_kv_heads == 0
    arguments.require(is_whole, "num_heads", f"a multiple of num_kv_heads = {shape.num_kv_heads}", shape.num_heads)
    arguments.require(1 <= shape.group <= GROUP_MAX, "num_heads", f"1 to {GROUP_MAX} a key-value head", shape.group)


def check_tensors(
    arguments: Arguments,
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    page_tables: torch.Tensor,
    *,
    num_rows: int,
    scoring: Scoring,
) -> HeadShape:
    """Check what decode and extend have in common, and give the shape.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments.tensor("queries", queries, shape=(None, None, None), dtypes=FLOAT_TYPES)
    _, num_heads, head_dim = queries.shape
    arguments.tensor("layer_pages", layer_pages, shape=(None, None, 2, None, head_dim), dtypes=(queries.dtype,))
    shape = HeadShape(num_heads, layer_pages.shape[3], head_dim, layer_pages.shape[1])
    check_shape(arguments, shape)
    arguments.tensor("page_tables", page_tables, shape=(num_rows, None), dtypes=INDEX_TYPES)
    arguments.require(scoring.scale > 0, "scoring.scale", "above 0", scoring.scale)
    arguments.require(scoring.window >= 0, "scoring.window", "0 (all) or a number of tokens", scoring.window)
    arguments.require(scoring.soft_cap >= 0, "scoring.soft_cap", "0 (none) or a bound", scoring.soft_cap)
    if scoring.sinks is not None:
        arguments.tensor("scoring.sinks", scoring.sinks, shape=(num_heads,), dtypes=(torch.float32,))
    return shape
