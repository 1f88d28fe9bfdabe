"""The definition of `selective_state_update` in plain torch: one step, or a few, of a selective state-space model's recurrence.

For every sequence, head h and channel p, with `g` the head's group:

    dt' = softplus(dt + dt_bias)                 (each part where asked for)
    s   = s * exp(dt' * a) + dt' * x * b[g]      s: [state_size]
    y   = sum(s * c[g]) + d * x                  (d where given), times z * sigmoid(z) (where given)

Source: Gu and Dao, Mamba (2023); Dao and Gu, Transformers are SSMs (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PAD_SLOT = -1
"""Slot of a row of padding: nothing of it is read or written."""


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What one layer has.

    Attributes:
        a: `[num_heads, head_dim, state_size]`, negative.
        d: `[num_heads, head_dim]`.
        dt_bias: `[num_heads, head_dim]`.
        is_softplus: Apply softplus to dt.
    """

    a: torch.Tensor
    d: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None
    is_softplus: bool = False


@dataclass(frozen=True, slots=True)
class Steps:
    """The inputs of a batch of sequences, each of as many steps.

    Attributes:
        x: `[num_sequences, num_steps, num_heads, head_dim]`.
        dt: As `x`.
        b: `[num_sequences, num_steps, num_groups, state_size]`; head h belongs to group `h // (num_heads // num_groups)`.
        c: As `b`.
        z: As `x`.
    """

    x: torch.Tensor
    dt: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    z: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Intermediate:
    """Where the state after each step is kept, so that a sequence can go back to one of them.

    Attributes:
        states: `[num_rows, num_steps or more, num_heads, head_dim, state_size]`.
        indices: int32 `[num_sequences]`: a sequence's row, counted apart from the slots of its state; negative for none.
    """

    states: torch.Tensor
    indices: torch.Tensor


def selective_state_update(
    layer: Recurrence,
    steps: Steps,
    states: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
    *,
    intermediate: Intermediate | None = None,
    is_state_kept: bool = True,
) -> None:
    """Move states on by the steps of a batch.

    Args:
        layer: The recurrence.
        steps: Its inputs.
        states: `[num_slots, num_heads, head_dim, state_size]`; moved on in place.
        slots: int32 `[num_sequences]`: whose state; `PAD_SLOT` for padding.
        out: As `steps.x`; rows of padding are not written.
        intermediate: Where the states between go.
        is_state_kept: Write the state after the last step back; without, `states` is left as it is.
    """
    num_heads, num_groups = steps.x.shape[2], steps.b.shape[2]
    group = torch.arange(num_heads) // (num_heads // num_groups)
    for sequence, slot in enumerate(slots.tolist()):
        if slot == PAD_SLOT:
            continue
        state = states[slot].float()
        for step in range(steps.x.shape[1]):
            x, dt = steps.x[sequence, step].float(), steps.dt[sequence, step].float()
            if layer.dt_bias is not None:
                dt = dt + layer.dt_bias.float()
            if layer.is_softplus:
                dt = F.softplus(dt)
            b, c = (each[sequence, step].float()[group][:, None] for each in (steps.b, steps.c))  # [num_heads, 1, state_size]
            state = state * torch.exp(dt[..., None] * layer.a.float()) + (dt * x)[..., None] * b
            if intermediate is not None and intermediate.indices[sequence] >= 0:
                intermediate.states[intermediate.indices[sequence], step] = state.to(intermediate.states.dtype)
            y = (state * c).sum(dim=-1)
            if layer.d is not None:
                y = y + layer.d.float() * x
            if steps.z is not None:
                y = y * F.silu(steps.z[sequence, step].float())
            out[sequence, step] = y.to(out.dtype)
        if is_state_kept:
            states[slot] = state.to(states.dtype)
