"""Host side of `causal_conv1d`: checks, blocks, launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from kernels.causal_conv1d.kernel import causal_conv1d_prefill_kernel, causal_conv1d_update_kernel
from kernels.causal_conv1d.reference import WIDTH_MAX, WIDTH_MIN, Filter
from kernels.launching import FLOAT_TYPES, Arguments, LaunchConfig, next_power_of_2

STATE_LEN_MAX: Final = 64
"""Inputs of a state, which one program moves on at a time."""

STEPS_MAX: Final = 64
"""Tokens a sequence of one update."""

SEQUENCES_MAX: Final = 65535
"""Sequences of one call: a bound of the launch grid."""

CONFIG: Final = LaunchConfig(num_warps=4)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Shape of a program's tile: tokens and channels."""

    time: int
    dim: int
    config: LaunchConfig


def prefill_blocks() -> Blocks:
    """Choose the tile of a prefill; its 16 tokens are more than a filter looks back."""
    return Blocks(16, 128, CONFIG)


def update_blocks(num_steps: int) -> Blocks:
    """Choose the tile of an update: all steps."""
    time = next_power_of_2(num_steps)
    return Blocks(time, 1024 // max(time, 8), CONFIG)


def constants_of(layer: Filter, state_len: int, blocks: Blocks) -> dict[str, Any]:
    """Constants of both kernels."""
    return {
        "HAS_BIAS": layer.bias is not None,
        "IS_SILU": layer.is_silu,
        "WIDTH": layer.weight.shape[1],
        "STATE_LEN": state_len,
        "BLOCK_TIME": blocks.time,
        "BLOCK_DIM": blocks.dim,
        "BLOCK_STATE": next_power_of_2(state_len),
    }


def causal_conv1d_prefill(
    x: torch.Tensor,
    layer: Filter,
    states: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    has_initial_state: torch.Tensor,
    *,
    length_max: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve sequences of any lengths and move their states on; see `reference.causal_conv1d_prefill`.

    Args:
        x: `[num_tokens, dim]`; rows may be strided.
        layer: The filter, its weight contiguous.
        states: `[num_slots, dim, state_len]` of any strides, no slot twice in `slots`.
        starts: int32 `[num_sequences + 1]`.
        slots: int32 `[num_sequences]`; negative for padding.
        has_initial_state: bool `[num_sequences]`.
        length_max: The longest length, or more; the host knows it, and the device is not asked.
        out: `[num_tokens, dim]` of x's type, not `x`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("causal_conv1d_prefill", x.device)
    arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
    num_sequences = _check(arguments, layer, states, slots, dim=x.shape[1])
    arguments.tensor("starts", starts, shape=(num_sequences + 1,), dtypes=(torch.int32,))
    arguments.tensor("has_initial_state", has_initial_state, shape=(num_sequences,), dtypes=(torch.bool,))
    arguments.require(length_max >= 0, "length_max", "0 or more", length_max)
    out = _out_of(arguments, x, out)
    if num_sequences == 0 or x.shape[1] == 0:
        return out
    blocks = prefill_blocks()
    grid = (max(-(-length_max // blocks.time), 1), -(-x.shape[1] // blocks.dim), num_sequences)
    causal_conv1d_prefill_kernel[grid](
        x,
        layer.weight,
        layer.bias,
        states,
        starts,
        slots,
        has_initial_state,
        out,
        x.shape[1],
        x.stride(0),
        *states.stride(),
        out.stride(0),
        **constants_of(layer, states.shape[2], blocks),
        **blocks.config.options(),
    )
    return out


def causal_conv1d_update(
    x: torch.Tensor, layer: Filter, states: torch.Tensor, slots: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve the next tokens of every sequence and move its state on; see `reference.causal_conv1d_update`.

    Args:
        x: `[num_sequences, num_steps, dim]`, strided but for the last dimension.
        layer: The filter, its weight contiguous.
        states: `[num_slots, dim, state_len]` of any strides, no slot twice in `slots`.
        slots: int32 `[num_sequences]`; negative for padding.
        out: As `x`, of its type, not `x`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("causal_conv1d_update", x.device)
    arguments.tensor("x", x, shape=(None, None, None), dtypes=FLOAT_TYPES)
    num_sequences, num_steps, dim = x.shape
    arguments.require(num_steps <= STEPS_MAX, "x", f"up to {STEPS_MAX} steps", num_steps)
    _check(arguments, layer, states, slots, dim=dim)
    arguments.tensor("slots", slots, shape=(num_sequences,), dtypes=(torch.int32,))
    out = _out_of(arguments, x, out)
    if x.numel() == 0:
        return out
    blocks = update_blocks(num_steps)
    causal_conv1d_update_kernel[(-(-dim // blocks.dim), num_sequences)](
        x,
        layer.weight,
        layer.bias,
        states,
        slots,
        out,
        dim,
        num_steps,
        x.stride(0),
        x.stride(1),
        *states.stride(),
        out.stride(0),
        out.stride(1),
        **constants_of(layer, states.shape[2], blocks),
        **blocks.config.options(),
    )
    return out


def _check(arguments: Arguments, layer: Filter, states: torch.Tensor, slots: torch.Tensor, *, dim: int) -> int:
    """Check what both have; gives the number of sequences."""
    arguments.tensor("weight", layer.weight, shape=(dim, None), dtypes=FLOAT_TYPES, is_contiguous=True)
    width = layer.weight.shape[1]
    arguments.require(WIDTH_MIN <= width <= WIDTH_MAX, "weight", f"a width of {WIDTH_MIN} to {WIDTH_MAX}", width)
    if layer.bias is not None:
        arguments.tensor("bias", layer.bias, shape=(dim,), dtypes=FLOAT_TYPES)
    arguments.tensor("states", states, shape=(None, dim, None), dtypes=FLOAT_TYPES, is_dense_last=False)
    is_long_enough = width - 1 <= states.shape[2] <= STATE_LEN_MAX
    arguments.require(is_long_enough, "states", f"{width - 1} to {STATE_LEN_MAX} inputs", states.shape[2])
    arguments.tensor("slots", slots, shape=(None,), dtypes=(torch.int32,))
    arguments.require(slots.shape[0] <= SEQUENCES_MAX, "slots", f"up to {SEQUENCES_MAX} sequences", slots.shape[0])
    return slots.shape[0]


def _out_of(arguments: Arguments, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments.tensor("out", out, shape=x.shape, dtypes=(x.dtype,))
    # Inputs are read by the programs of later tokens too.
    arguments.require(x.numel() == 0 or out.data_ptr() != x.data_ptr(), "out", "another tensor than x", "x")
    return out
