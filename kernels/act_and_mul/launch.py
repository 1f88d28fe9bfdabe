"""Host side of gated activations: checks, blocks, launch."""

from __future__ import annotations

from typing import Final

import torch

from kernels.act_and_mul.kernel import act_and_mul_kernel
from kernels.launching import FLOAT_TYPES, Arguments, Launch, LaunchConfig, next_power_of_2, planned

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
CONFIG: Final = LaunchConfig(num_warps=4)

_BLOCK_MAX: Final = 1024


def block_of(size: int) -> int:
    """Elements of a program: eight a thread at most."""
    return min(next_power_of_2(size), _BLOCK_MAX)


def act_and_mul(gate_up: torch.Tensor, activation: str, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `act(gate) * up`.

    Args:
        gate_up: `[num_tokens, 2 * intermediate_size]`, gate first; rows may be strided.
        activation: One of `ACTIVATIONS`.
        out: `[num_tokens, intermediate_size]`, where to; not a part of `gate_up`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong, or the activation is unknown.
    """
    if out is None:
        out = torch.empty((gate_up.shape[0], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    _plan(gate_up, activation, out)(gate_up, out)
    return out


@planned
def _plan(gate_up: torch.Tensor, activation: str, out: torch.Tensor) -> Launch:
    """Check the arguments, and plan the launch on `gate_up` and `out`."""
    arguments = Arguments("act_and_mul", gate_up.device)
    arguments.require(activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    arguments.tensor("gate_up", gate_up, shape=(None, None), dtypes=FLOAT_TYPES)
    num_tokens, both = gate_up.shape
    arguments.require(both % 2 == 0, "gate_up", "an even number of columns", both)
    size = both // 2
    arguments.tensor("out", out, shape=(num_tokens, size), dtypes=(gate_up.dtype,))
    block = block_of(size)
    numbers, constants = (size, gate_up.stride(0), out.stride(0)), {"ACTIVATION": activation, "BLOCK": block}
    return Launch(act_and_mul_kernel, (num_tokens, -(-size // block)), numbers, constants, CONFIG)


def silu_and_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`act_and_mul` with SiLU."""
    return act_and_mul(gate_up, "silu", out=out)


def gelu_and_mul(gate_up: torch.Tensor, *, approximate: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """`act_and_mul` with GELU: the exact one, or the approximation by a hyperbolic tangent."""
    return act_and_mul(gate_up, "gelu_tanh" if approximate else "gelu", out=out)
