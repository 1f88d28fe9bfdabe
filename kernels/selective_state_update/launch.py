"""Host side of `selective_state_update`: checks, blocks, launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from kernels.launching import FLOAT_TYPES, Arguments, LaunchConfig, next_power_of_2
from kernels.selective_state_update.kernel import selective_state_update_kernel
from kernels.selective_state_update.reference import Intermediate, Recurrence, Steps

STATE_SIZE_MAX: Final = 256
"""Elements of a channel's state, which one program holds in registers."""

GRID_MAX: Final = 65535
"""Heads, and sequences, of one call: bounds of the launch grid."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Shape of a program's tile: channels, and elements of their states."""

    dim: int
    state: int
    config: LaunchConfig


def blocks_of(state_size: int) -> Blocks:
    """Choose the tile: few channels of a large state, more of a small one, so that a thread holds 4 to 16 elements."""
    state = next_power_of_2(state_size)
    dim = 32 if state <= 16 else 16 if state <= 32 else 8 if state <= 64 else 4
    return Blocks(dim, state, LaunchConfig(num_warps=4 if state <= 128 else 8))


def constants_of(layer: Recurrence, blocks: Blocks, *, has_z: bool, has_intermediate: bool, is_state_kept: bool) -> dict[str, Any]:
    """Constants of the kernel."""
    return {
        "HAS_D": layer.d is not None,
        "HAS_Z": has_z,
        "HAS_DT_BIAS": layer.dt_bias is not None,
        "IS_SOFTPLUS": layer.is_softplus,
        "IS_STATE_KEPT": is_state_kept,
        "HAS_INTERMEDIATE": has_intermediate,
        "BLOCK_DIM": blocks.dim,
        "BLOCK_STATE": blocks.state,
    }


def selective_state_update(
    layer: Recurrence,
    steps: Steps,
    states: torch.Tensor,
    slots: torch.Tensor,
    *,
    intermediate: Intermediate | None = None,
    is_state_kept: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move states on by the steps of a batch; see `reference.selective_state_update`.

    Args:
        layer: The recurrence. What a head or a channel has in common may be given by stride 0 (`expand`).
        steps: Its inputs; strided but for the last dimension, dt strided at will.
        states: `[num_slots, num_heads, head_dim, state_size]`, dense in the last dimension; no slot twice in `slots`.
        slots: int32 `[num_sequences]`; negative for padding.
        intermediate: Where the states between go; no row twice among its indices.
        is_state_kept: Write the state after the last step back.
        out: As `steps.x`, of its type; may be `steps.x`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    x = steps.x
    arguments = Arguments("selective_state_update", x.device)
    arguments.tensor("x", x, shape=(None,) * 4, dtypes=FLOAT_TYPES)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    arguments.tensor("out", out, shape=x.shape, dtypes=(x.dtype,))
    _check_states(arguments, x, states, slots)
    _check_layer(arguments, x, layer, state_size=states.shape[3])
    _check_steps(arguments, steps, state_size=states.shape[3])
    if intermediate is not None:
        _check_intermediate(arguments, intermediate, x, states)
    if x.numel() == 0:
        return out
    _launch(layer, steps, states, slots, intermediate, out, is_state_kept=is_state_kept)
    return out


def _check_states(arguments: Arguments, x: torch.Tensor, states: torch.Tensor, slots: torch.Tensor) -> None:
    num_sequences, _, num_heads, head_dim = x.shape
    arguments.tensor("states", states, shape=(None, num_heads, head_dim, None), dtypes=FLOAT_TYPES)
    is_held = 1 <= states.shape[3] <= STATE_SIZE_MAX
    arguments.require(is_held, "states", f"a state size of 1 to {STATE_SIZE_MAX}", states.shape[3])
    arguments.tensor("slots", slots, shape=(num_sequences,), dtypes=(torch.int32,))
    for name, size in (("sequences", num_sequences), ("heads", num_heads)):
        arguments.require(size <= GRID_MAX, "x", f"up to {GRID_MAX} {name}", size)


def _check_layer(arguments: Arguments, x: torch.Tensor, layer: Recurrence, *, state_size: int) -> None:
    shape = (x.shape[2], x.shape[3], state_size)
    arguments.tensor("a", layer.a, shape=shape, dtypes=FLOAT_TYPES, is_dense_last=False)
    for name, tensor in (("d", layer.d), ("dt_bias", layer.dt_bias)):
        if tensor is not None:
            arguments.tensor(name, tensor, shape=shape[:2], dtypes=FLOAT_TYPES, is_dense_last=False)


def _check_steps(arguments: Arguments, steps: Steps, *, state_size: int) -> None:
    num_sequences, num_steps, num_heads, _ = steps.x.shape
    arguments.tensor("dt", steps.dt, shape=steps.x.shape, dtypes=FLOAT_TYPES, is_dense_last=False)
    arguments.tensor("b", steps.b, shape=(num_sequences, num_steps, None, state_size), dtypes=FLOAT_TYPES)
    num_groups = steps.b.shape[2]
    does_divide = num_groups > 0 and num_heads % num_groups == 0
    arguments.require(does_divide, "b", f"groups that divide {num_heads} heads", num_groups)
    arguments.tensor("c", steps.c, shape=steps.b.shape, dtypes=FLOAT_TYPES)
    if steps.z is not None:
        arguments.tensor("z", steps.z, shape=steps.x.shape, dtypes=FLOAT_TYPES)


def _check_intermediate(arguments: Arguments, intermediate: Intermediate, x: torch.Tensor, states: torch.Tensor) -> None:
    shape = (None, None, *states.shape[1:])
    arguments.tensor("intermediate.states", intermediate.states, shape=shape, dtypes=FLOAT_TYPES)
    num_steps = intermediate.states.shape[1]
    arguments.require(num_steps >= x.shape[1], "intermediate.states", f"{x.shape[1]} steps or more", num_steps)
    arguments.tensor("intermediate.indices", intermediate.indices, shape=(x.shape[0],), dtypes=(torch.int32,))


def _strides(tensor: torch.Tensor | None, dims: Sequence[int]) -> list[int]:
    return [0 if tensor is None else tensor.stride(dim) for dim in dims]


def _launch(
    layer: Recurrence,
    steps: Steps,
    states: torch.Tensor,
    slots: torch.Tensor,
    intermediate: Intermediate | None,
    out: torch.Tensor,
    *,
    is_state_kept: bool,
) -> None:
    num_sequences, num_steps, num_heads, head_dim = steps.x.shape
    state_size = states.shape[3]
    blocks = blocks_of(state_size)
    kept = None if intermediate is None else intermediate.states
    has_z, has_intermediate = steps.z is not None, intermediate is not None
    selective_state_update_kernel[(-(-head_dim // blocks.dim), num_heads, num_sequences)](
        states,
        steps.x,
        steps.dt,
        layer.a,
        steps.b,
        steps.c,
        layer.d,
        steps.z,
        layer.dt_bias,
        slots,
        kept,
        None if intermediate is None else intermediate.indices,
        out,
        num_steps,
        head_dim,
        state_size,
        num_heads // steps.b.shape[2],
        *_strides(states, (0, 1, 2)),
        *_strides(steps.x, (0, 1, 2)),
        *_strides(steps.dt, (0, 1, 2, 3)),
        *_strides(layer.a, (0, 1, 2)),
        *_strides(steps.b, (0, 1, 2)),
        *_strides(steps.c, (0, 1, 2)),
        *_strides(layer.d, (0, 1)),
        *_strides(steps.z, (0, 1, 2)),
        *_strides(layer.dt_bias, (0, 1)),
        *_strides(kept, (0, 1, 2, 3)),
        *_strides(out, (0, 1, 2)),
        **constants_of(layer, blocks, has_z=has_z, has_intermediate=has_intermediate, is_state_kept=is_state_kept),
        **blocks.config.options(),
    )
