"""Root-mean-square normalisation: `x / sqrt(mean(x²) + eps) * weight`, over the last dimension, summed in float32.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
"""

from __future__ import annotations

import torch
from torch.nn import functional


class RmsNorm:
    """One normalisation with its learned scale `weight: [hidden_size]`."""

    def __init__(self, weight: torch.Tensor, *, eps: float) -> None:
        self._weight = weight
        self._shape = (weight.shape[0],)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x: [num_tokens, hidden_size]`; the type is kept."""
        return functional.rms_norm(x, self._shape, self._weight, self._eps)
