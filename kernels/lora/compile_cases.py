"""What is compiled and put on the roofline for low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.lora.kernel import lora_expand_kernel, lora_shrink_kernel
from kernels.lora.launch import expand_constants, expand_tiles_of, num_splits_of, shrink_constants, shrink_tiles_of

COUNTS = frozenset({"rank_max", "stride_parts_split", "stride_parts_token"})


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Ranks from 8 to 256, with and without an order, in three types; alike on all architectures."""
    for rank_max in (16, 8, 64, 256):
        yield from _both(torch.bfloat16, rank_max, num_inputs=4096, is_hot=rank_max == 16)
    yield from _both(torch.bfloat16, 16, num_inputs=576)
    yield from _both(torch.bfloat16, 64, num_inputs=16384)
    yield from _both(torch.bfloat16, 16, num_inputs=4096, has_order=False)
    yield from _both(torch.float16, 16, num_inputs=4096)
    yield from _both(torch.float32, 16, num_inputs=4096)


def workloads() -> Iterator[Workload]:
    """A projection of 4096 inputs and outputs: x in, out in and out, each used adapter's two matrices once."""
    size = 4096
    for num_tokens, num_adapters, rank in ((1, 1, 16), (64, 8, 16), (64, 64, 16), (64, 8, 64), (4096, 1, 16)):
        num_bytes = 2 * (3 * num_tokens * size + num_adapters * 2 * rank * size)
        label = f"bf16, {num_tokens} tokens, {num_adapters} adapters of rank {rank}, {size} × {size}"
        yield Workload(label, num_bytes, 2 * 2 * num_tokens * rank * size, "fp16")


def _both(
    dtype: torch.dtype, rank_max: int, *, num_inputs: int, has_order: bool = True, is_hot: bool = False
) -> Iterator[CompileCase]:
    pointer, num_splits = "*" + TYPE_NAMES[dtype], num_splits_of(num_inputs)
    common = {"parts_ptr": "*fp32"} | dict.fromkeys(("ranks_ptr", "starts_ptr", "adapters_ptr"), "*i32")
    absent: dict[str, Any] = {}
    if has_order:
        common["order_ptr"] = "*i32"
    else:
        absent["order_ptr"] = None
    label = f"{TYPE_NAMES[dtype]}, rank {rank_max}, {num_splits} splits{', in order' if has_order else ''}"
    tiles = shrink_tiles_of(rank_max, dtype)
    yield _case(
        label,
        lora_shrink_kernel,
        common | {"x_ptr": pointer, "a_ptr": pointer},
        absent | shrink_constants(tiles, num_splits, has_order=has_order),
        tiles.config,
        is_hot=is_hot,
    )
    tiles = expand_tiles_of(rank_max)
    yield _case(
        label,
        lora_expand_kernel,
        common | {"b_ptr": pointer, "out_ptr": pointer, "scalings_ptr": "*fp32"},
        absent | expand_constants(tiles, num_splits, has_order=has_order),
        tiles.config,
        is_hot=is_hot,
    )


def _case(label: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], config: Any, *, is_hot: bool) -> CompileCase:
    types = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return CompileCase(label, kernel, types, constants, config, unaligned=COUNTS, is_hot=is_hot)
