"""What is compiled and put on the roofline for causal convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.causal_conv1d import kernel
from kernels.causal_conv1d.launch import Blocks, constants_of, prefill_blocks, update_blocks
from kernels.causal_conv1d.reference import WIDTH_MAX, WIDTH_MIN, Filter

UNALIGNED = frozenset({"num_steps", "stride_state_dim", "stride_state_column"})


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Every width, states with inputs or with channels as neighbours, updates by one token and by several."""
    for width in (4, *(each for each in range(WIDTH_MIN, WIDTH_MAX + 1) if each != 4)):
        yield _prefill(torch.bfloat16, width)
        yield _update(torch.bfloat16, width, num_steps=1, is_hot=width == 4)
    yield _prefill(torch.bfloat16, 4, is_state_dense=False)
    yield _update(torch.bfloat16, 4, num_steps=1, is_state_dense=False)
    yield _update(torch.bfloat16, 4, num_steps=5)
    yield _update(torch.bfloat16, 5, num_steps=64)
    yield _update(torch.bfloat16, 4, num_steps=1, state_len=8)
    for dtype in (torch.float16, torch.float32):
        yield _prefill(dtype, 4)
        yield _update(dtype, 4, num_steps=1)


def workloads() -> Iterator[Workload]:
    """A Mamba layer of 8192 channels and width 4: x in and out, the state in and out; twelve operations an output."""
    dim = 8192
    for num_sequences, length in ((64, 1), (1, 4096)):
        size = num_sequences * length * dim
        num_bytes = 2 * (2 * size + 2 * num_sequences * dim * 3 + dim * 5)
        yield Workload(f"bf16, width 4, {num_sequences} × {length} × {dim}", num_bytes, 12 * size, "fp32")


def _prefill(dtype: torch.dtype, width: int, *, is_state_dense: bool = True) -> CompileCase:
    types = {"starts_ptr": "*i32", "has_initial_state_ptr": "*i1", "stride_x_token": "i32", "stride_out_token": "i32"}
    return _case(
        kernel.causal_conv1d_prefill_kernel, types, dtype, width, width - 1, prefill_blocks(), is_state_dense=is_state_dense
    )


def _update(
    dtype: torch.dtype,
    width: int,
    *,
    num_steps: int,
    state_len: int | None = None,
    is_state_dense: bool = True,
    is_hot: bool = False,
) -> CompileCase:
    names = ("num_steps", "stride_x_sequence", "stride_x_step", "stride_out_sequence", "stride_out_step")
    types = dict.fromkeys(names, "i32")
    blocks, state_len = update_blocks(num_steps), state_len or width - 1
    function = kernel.causal_conv1d_update_kernel
    return _case(function, types, dtype, width, state_len, blocks, is_state_dense=is_state_dense, is_hot=is_hot)


def _case(
    function: Any,
    types: dict[str, str],
    dtype: torch.dtype,
    width: int,
    state_len: int,
    blocks: Blocks,
    *,
    is_state_dense: bool,
    is_hot: bool = False,
) -> CompileCase:
    pointer = "*" + TYPE_NAMES[dtype]
    types |= dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "state_ptr", "out_ptr"), pointer)
    types |= {
        "slots_ptr": "*i32",
        "dim": "i32",
        "stride_state_slot": "i32",
        "stride_state_dim": "i32",
        "stride_state_column": "i32",
    }
    layer = Filter(torch.empty(1, width, device="meta"), torch.empty(1, device="meta"))
    constants = constants_of(layer, state_len, blocks)
    one = "stride_state_column" if is_state_dense else "stride_state_dim"
    del types[one]
    constants[one] = 1
    label = f"{TYPE_NAMES[dtype]}, width {width}, state of {state_len}, {blocks.time} × {blocks.dim}"
    label += "" if is_state_dense else ", channels dense"
    return CompileCase(label, function, types, constants, blocks.config, unaligned=UNALIGNED, is_hot=is_hot)
