"""Excluding tokens by bits, in plain torch: the definition."""

from __future__ import annotations

import torch


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    """Set the logits of tokens whose bit is 0 to minus infinity, in place.

    Args:
        logits: `[num_rows, vocab_size]`.
        bitmask: int32 `[num_masks, ceil(vocab_size / 32)]`; bit `t % 32` of word `t // 32` stands for token `t`, 1 allows it.
        rows: `[num_masks]`: which row each mask is for; each row once at most. A negative one is padding.
    """
    vocab_size = logits.shape[1]
    tokens = torch.arange(vocab_size, device=logits.device)
    is_allowed = (bitmask[:, tokens // 32] >> (tokens % 32).int()) & 1
    for mask, row in enumerate(rows.tolist()):
        if row >= 0:
            logits[row].masked_fill_(is_allowed[mask] == 0, -torch.inf)
