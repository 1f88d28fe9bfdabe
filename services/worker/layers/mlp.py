"""The gated feed-forward block: `down(act(gate(x)) * up(x))`, gate and up in one multiplication.

Source: Shazeer, GLU Variants Improve Transformer (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch.nn import functional

from headrace.errors import ModelError
from services.worker.layers.linear import Linear

ACTIVATIONS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
"""Activation functions by their name in config.json (`hidden_act`)."""


class GatedMlp:
    """One block.

    Args:
        gate_up: `[2 * intermediate_size, hidden_size]`, the gate's rows first.
        down: `[hidden_size, intermediate_size]`.
        activation: A name of `ACTIVATIONS`.

    Raises:
        ModelError: The activation is not supported.
    """

    def __init__(self, gate_up: Linear, down: Linear, *, activation: str) -> None:
        if activation not in ACTIVATIONS:
            raise ModelError(
                f"hidden_act {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}", param="hidden_act"
            )
        self._gate_up = gate_up
        self._down = down
        self._activation = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to `x: [num_tokens, hidden_size]`."""
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(self._activation(gate).mul_(up))
