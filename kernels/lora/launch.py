"""Host side of `lora`: checks, tiles, launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from kernels.launching import FLOAT_TYPES, Arguments, LaunchConfig, next_power_of_2
from kernels.lora.kernel import lora_expand_kernel, lora_shrink_kernel
from kernels.lora.reference import Segments

RANK_MAX: Final = 512

SEGMENTS_MAX: Final = 65535
"""Segments of one call: a bound of the launch grid."""

SPLIT_INPUTS: Final = 1024
"""Inputs of one split of a shrink: its products alone would keep too few programs busy at decode."""

SPLITS_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a product's tile: tokens, columns, and length of a step."""

    block_m: int
    block_n: int
    block_k: int
    config: LaunchConfig


@dataclass(frozen=True, slots=True)
class Parts:
    """What a shrink leaves for the expand: `[num_splits, num_tokens, num_slices, rank_max]` float32, to be added up over splits.

    Parts of tokens without an adapter are not written.
    """

    parts: torch.Tensor

    def total(self) -> torch.Tensor:
        """Add the splits up, in order: `[num_tokens, num_slices, rank_max]`."""
        total = self.parts[0].clone()
        for part in self.parts[1:]:
            total += part
        return total


def num_splits_of(num_inputs: int) -> int:
    """Give the number of splits; the inputs alone decide, so that a token's sum has one order in every batch."""
    return min(max(num_inputs // SPLIT_INPUTS, 1), SPLITS_MAX)


def shrink_tiles_of(rank_max: int, dtype: torch.dtype) -> Tiles:
    """Choose the tile of a shrink."""
    block_r = min(max(next_power_of_2(rank_max), 16), 64)
    return Tiles(16, block_r, 64 if dtype == torch.float32 else 128, LaunchConfig(num_warps=4, num_stages=3))


def expand_tiles_of(rank_max: int) -> Tiles:
    """Choose the tile of an expand; its step is along the rank."""
    block_r = min(max(next_power_of_2(rank_max), 16), 64)
    return Tiles(16, 64, block_r, LaunchConfig(num_warps=4, num_stages=2))


def shrink_constants(tiles: Tiles, num_splits: int, *, has_order: bool) -> dict[str, Any]:
    """Constants of the shrinking kernel."""
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_R": tiles.block_n, "BLOCK_K": tiles.block_k}
    return {"HAS_ORDER": has_order, "NUM_SPLITS": num_splits, **blocks}


def expand_constants(tiles: Tiles, num_splits: int, *, has_order: bool) -> dict[str, Any]:
    """Constants of the expanding kernel."""
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_R": tiles.block_k}
    return {"HAS_ORDER": has_order, "NUM_SPLITS": num_splits, **blocks}


def lora_shrink(
    x: torch.Tensor, a: torch.Tensor, ranks: torch.Tensor, segments: Segments, *, length_max: int, num_splits: int | None = None
) -> Parts:
    """Project tokens down; see `reference.lora_shrink`.

    Args:
        x: `[num_tokens, num_inputs]`; rows may be strided.
        a: `[num_adapters, num_slices, rank_max, num_inputs]` of x's type, strided but for the last dimension.
        ranks: int32 `[num_adapters]`.
        segments: Who has which.
        length_max: Tokens of the longest segment, or more; the host knows it, and the device is not asked.
        num_splits: Splits of the sum; by default `num_splits_of` the inputs.

    Returns:
        The parts of the sums.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("lora_shrink", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
    num_tokens, num_inputs = x.shape
    arguments.require(num_inputs > 0, "x", "at least 1 input", num_inputs)
    arguments.tensor("a", a, shape=(None, None, None, num_inputs), dtypes=(x.dtype,))
    num_adapters, num_slices, rank_max, _ = a.shape
    arguments.require(1 <= rank_max <= RANK_MAX, "a", f"ranks of 1 to {RANK_MAX}", rank_max)
    arguments.tensor("ranks", ranks, shape=(num_adapters,), dtypes=(torch.int32,))
    num_segments = _check_segments(arguments, segments, length_max, num_tokens)
    num_splits = num_splits or num_splits_of(num_inputs)
    parts = torch.empty((num_splits, num_tokens, num_slices, rank_max), dtype=torch.float32, device=x.device)
    if num_segments == 0 or length_max == 0 or parts.numel() == 0:
        return Parts(parts)
    tiles = shrink_tiles_of(rank_max, x.dtype)
    num_columns = num_slices * -(-rank_max // tiles.block_n)
    lora_shrink_kernel[(num_columns * num_splits, -(-length_max // tiles.block_m), num_segments)](
        x,
        a,
        ranks,
        segments.starts,
        segments.adapters,
        segments.order,
        parts,
        num_inputs,
        rank_max,
        x.stride(0),
        a.stride(0),
        a.stride(1),
        a.stride(2),
        parts.stride(0),
        parts.stride(1),
        **shrink_constants(tiles, num_splits, has_order=segments.order is not None),
        **tiles.config.options(),
    )
    return Parts(parts)


def lora_expand(
    h: Parts,
    b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    segments: Segments,
    out: torch.Tensor,
    *,
    length_max: int,
) -> torch.Tensor:
    """Project tokens up and add to `out`; see `reference.lora_expand`.

    Args:
        h: From `lora_shrink` of the same segments.
        b: For each slice `[num_adapters, width, rank_max]` of out's type, strided but for the last dimension.
        ranks: int32 `[num_adapters]`.
        scalings: float32 `[num_adapters]`.
        segments: Who has which.
        out: `[num_tokens, sum of the widths]`; rows may be strided.
        length_max: Tokens of the longest segment, or more.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("lora_expand", out.device)
    num_splits, num_tokens, num_slices, rank_max = h.parts.shape
    arguments.tensor("h", h.parts, shape=(None,) * 4, dtypes=(torch.float32,), is_contiguous=True)
    arguments.require(len(b) == num_slices, "b", f"{num_slices} slices", len(b))
    num_adapters = ranks.shape[0] if ranks.dim() else 0
    arguments.tensor("ranks", ranks, shape=(num_adapters,), dtypes=(torch.int32,))
    arguments.tensor("scalings", scalings, shape=(num_adapters,), dtypes=(torch.float32,))
    for index, of_slice in enumerate(b):
        arguments.tensor(f"b[{index}]", of_slice, shape=(num_adapters, None, rank_max), dtypes=(out.dtype,))
    num_outputs = sum(each.shape[1] for each in b)
    arguments.tensor("out", out, shape=(num_tokens, num_outputs), dtypes=FLOAT_TYPES)
    num_segments = _check_segments(arguments, segments, length_max, num_tokens)
    if num_segments == 0 or length_max == 0 or num_tokens == 0:
        return out
    tiles, first = expand_tiles_of(rank_max), 0
    constants = expand_constants(tiles, num_splits, has_order=segments.order is not None)
    for index, of_slice in enumerate(b):
        width = of_slice.shape[1]
        if width == 0:
            continue
        lora_expand_kernel[(-(-width // tiles.block_n), -(-length_max // tiles.block_m), num_segments)](
            h.parts[:, :, index],
            of_slice,
            ranks,
            scalings,
            segments.starts,
            segments.adapters,
            segments.order,
            out[:, first:],
            width,
            h.parts.stride(0),
            h.parts.stride(1),
            of_slice.stride(0),
            of_slice.stride(1),
            out.stride(0),
            **constants,
            **tiles.config.options(),
        )
        first += width
    return out


def _check_segments(arguments: Arguments, segments: Segments, length_max: int, num_tokens: int) -> int:
    """Check who has which; gives the number of segments."""
    arguments.tensor("adapters", segments.adapters, shape=(None,), dtypes=(torch.int32,))
    num_segments = segments.adapters.shape[0]
    arguments.require(num_segments <= SEGMENTS_MAX, "adapters", f"up to {SEGMENTS_MAX} segments", num_segments)
    arguments.tensor("starts", segments.starts, shape=(num_segments + 1,), dtypes=(torch.int32,))
    if segments.order is not None:
        arguments.tensor("order", segments.order, shape=(None,), dtypes=(torch.int32,))
        num_places = segments.order.shape[0]
        arguments.require(num_places <= num_tokens, "order", f"up to {num_tokens} places", num_places)
    arguments.require(0 <= length_max <= num_tokens, "length_max", f"0 to {num_tokens}", length_max)
    return num_segments
