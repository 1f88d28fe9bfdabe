"""What is compiled and put on the roofline for state-space decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.aot.cases import TYPE_NAMES, CompileCase, Workload
from kernels.architecture import Architecture
from kernels.selective_state_update.kernel import selective_state_update_kernel
from kernels.selective_state_update.launch import blocks_of, constants_of
from kernels.selective_state_update.reference import Recurrence

COUNTS = frozenset(
    {"num_steps", "head_dim", "heads_per_group", "stride_a_head", "stride_d_head", "stride_dt_bias_head", "stride_dt_head"}
)


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Mamba 2 by state size and type, with the states between, without keeping any, and Mamba 1; alike on all architectures."""
    yield _case(torch.bfloat16, 128, is_hot=True)
    for state_size in (16, 32, 64, 256):
        yield _case(torch.bfloat16, state_size)
    yield _case(torch.bfloat16, 128, state_type=torch.bfloat16)
    yield _case(torch.float16, 128)
    yield _case(torch.float32, 128)
    yield _case(torch.bfloat16, 128, has_intermediate=True, is_state_kept=False)
    yield _case(torch.bfloat16, 16, is_mamba_1=True)


def workloads() -> Iterator[Workload]:
    """A Mamba 2 layer of 128 heads of 64, state 128, 8 groups: states in and out dominate; seven operations an element of state."""
    num_heads, head_dim, state_size, num_groups = 128, 64, 128, 8
    for num_sequences in (1, 64, 256):
        size = num_sequences * num_heads * head_dim
        for name, num_state_bytes in (("float32", 4), ("bf16", 2)):
            num_bytes = 2 * num_state_bytes * size * state_size + 2 * (2 * size + 2 * num_sequences * num_groups * state_size)
            label = f"{num_sequences} × 128 heads of 64 × 128, {name} state"
            yield Workload(label, num_bytes, 7 * size * state_size, "fp32")


def _case(
    dtype: torch.dtype,
    state_size: int,
    *,
    state_type: torch.dtype = torch.float32,
    has_intermediate: bool = False,
    is_state_kept: bool = True,
    is_mamba_1: bool = False,
    is_hot: bool = False,
) -> CompileCase:
    blocks, nothing = blocks_of(state_size), torch.empty(1, device="meta")
    layer = Recurrence(nothing, nothing, nothing, is_softplus=True)
    form = {"has_z": is_mamba_1, "has_intermediate": has_intermediate, "is_state_kept": is_state_kept}
    constants: dict[str, Any] = constants_of(layer, blocks, **form)
    if is_mamba_1:
        constants |= dict.fromkeys(("stride_a_state", "stride_dt_dim", "stride_d_dim", "stride_dt_bias_dim"), 1)
    else:
        # One number a head, so strides of 0, which count as divisible.
        constants["z_ptr"] = None
    if not has_intermediate:
        constants |= {"intermediate_ptr": None, "intermediate_indices_ptr": None}
    pointer, state_pointer = "*" + TYPE_NAMES[dtype], "*" + TYPE_NAMES[state_type]
    given = {"state_ptr": state_pointer, "intermediate_ptr": state_pointer}
    given |= dict.fromkeys(("slots_ptr", "intermediate_indices_ptr"), "*i32")
    given |= dict.fromkeys(("a_ptr", "d_ptr", "dt_bias_ptr"), "*fp32")
    types = {}
    for name in selective_state_update_kernel.arg_names:
        if name not in constants:
            types[name] = given.get(name, pointer if name.endswith("_ptr") else "i32")
    label = f"{TYPE_NAMES[dtype]}, state {TYPE_NAMES[state_type]} of {state_size}, {blocks.dim} channels"
    label += ", states between" if has_intermediate else ""
    label += ", Mamba 1" if is_mamba_1 else ""
    return CompileCase(label, selective_state_update_kernel, types, constants, blocks.config, unaligned=COUNTS, is_hot=is_hot)
