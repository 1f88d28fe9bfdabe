"""Gated activations, in plain torch: the definition. `y = act(gate) * up`, in float64, rounded once at the end.

Source: Shazeer, GLU Variants Improve Transformer (2020); Hendrycks and Gimpel, Gaussian Error Linear Units (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch.nn import functional

ACTIVATIONS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
"""By name; `gelu` is the exact one, by the error function."""


def act_and_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply to `gate_up: [num_tokens, 2 * intermediate_size]`, gate first; gives `[num_tokens, intermediate_size]`."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)
