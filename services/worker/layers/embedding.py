"""Token embedding: a row of the table a token."""

from __future__ import annotations

import torch
from torch.nn import functional


class Embedding:
    """The table `weight: [vocab_size, hidden_size]`."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up `token_ids: [num_tokens]`, all below the vocabulary size; gives `[num_tokens, hidden_size]`."""
        return functional.embedding(token_ids, self.weight)
