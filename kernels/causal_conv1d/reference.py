"""The definition of `causal_conv1d` in plain torch: a depthwise convolution over time that looks back only, with its state.

    y[t] = activation(bias + sum_j weight[:, j] * x[t - (width - 1) + j]),  j = 0 … width - 1

Inputs before a sequence's first come from its state: the last `state_len >= width - 1` inputs, oldest first. It is moved on.

Source: Gu and Dao, Mamba (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PAD_SLOT = -1
"""Slot of a row of padding: its inputs are not read, neither outputs nor any state are written."""

WIDTH_MIN, WIDTH_MAX = 2, 5


@dataclass(frozen=True, slots=True)
class Filter:
    """What one layer convolves with.

    Attributes:
        weight: `[dim, width]`.
        bias: `[dim]`.
        is_silu: Apply SiLU to the result.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    is_silu: bool = True


def causal_conv1d_prefill(
    x: torch.Tensor,
    layer: Filter,
    states: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    has_initial_state: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Convolve sequences of any lengths, laid one after the other.

    Args:
        x: `[num_tokens, dim]`.
        layer: The filter.
        states: `[num_slots, dim, state_len]`, moved on in place.
        starts: int32 `[num_sequences + 1]`: sequence i has tokens `starts[i] … starts[i + 1] - 1`. An empty one keeps its state, or
            gets one of zeros where its state does not count as initial.
        slots: int32 `[num_sequences]`: whose state; `PAD_SLOT` for padding.
        has_initial_state: bool `[num_sequences]`: whether the state counts; else it is taken for zeros.
        out: `[num_tokens, dim]`; tokens of no sequence, and of padding, are not written.
    """
    width, state_len = layer.weight.shape[1], states.shape[2]
    for sequence, slot in enumerate(slots.tolist()):
        if slot == PAD_SLOT:
            continue
        begin, end = starts[sequence : sequence + 2].tolist()
        state = states[slot].float()
        before = state if has_initial_state[sequence] else torch.zeros_like(state)
        inputs = torch.cat([before, x[begin:end].float().T], dim=1)  # [dim, state_len + length]
        if end > begin:
            windows = inputs[:, state_len - (width - 1) :].unfold(1, width, 1)  # [dim, length, width]
            y = (windows * layer.weight.float()[:, None]).sum(dim=-1)
            if layer.bias is not None:
                y = y + layer.bias.float()[:, None]
            out[begin:end] = (F.silu(y) if layer.is_silu else y).T.to(out.dtype)
        states[slot] = inputs[:, inputs.shape[1] - state_len :].to(states.dtype)


def causal_conv1d_update(x: torch.Tensor, layer: Filter, states: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Convolve the next few tokens of every sequence: as the prefill with an initial state, all of one length.

    Args:
        x: `[num_sequences, num_steps, dim]`.
        layer: The filter.
        states: `[num_slots, dim, state_len]`, moved on in place.
        slots: int32 `[num_sequences]`; `PAD_SLOT` for padding.
        out: As `x`; rows of padding are not written.
    """
    num_sequences, num_steps, dim = x.shape
    flat = out.reshape(-1, dim).clone()
    starts, all_initial = torch.arange(num_sequences + 1) * num_steps, torch.ones(num_sequences, dtype=torch.bool)
    causal_conv1d_prefill(x.reshape(-1, dim), layer, states, starts, slots, all_initial, flat)
    out.copy_(flat.view(x.shape))
