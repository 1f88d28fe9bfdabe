"""What the model asks of an attention backend, and the step as it sees it.

A step's tokens lie flat, decode rows (one token each) first, then extend rows (several tokens each). A backend prepares once a
step what all layers share (`prepare`), then each layer stores its new keys and values and attends over the pages (`attend`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch


@dataclass(frozen=True, slots=True)
class ExtendRow:
    """One row that computes several tokens over a cached prefix.

    Attributes:
        first_token: Index of its first token in the flat step.
        num_new_tokens: Tokens it computes.
        num_cached_tokens: Tokens whose keys and values the pages hold already.
        pages: int64 `[num_pages]`, enough for cached and new tokens together.
    """

    first_token: int
    num_new_tokens: int
    num_cached_tokens: int
    pages: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step on its way through the model.

    Attributes:
        token_ids: int64 `[num_tokens]`.
        positions: int64 `[num_tokens]`, index of each token in its sequence.
        slot_mapping: int64 `[num_tokens]`, where each token's keys and values go: `page * page_size + offset`.
        decode_page_tables: int64 `[num_decode_rows, width]`; entries past a row's pages repeat a page of the same row, so that
            padding never reads what another sequence wrote. `width` is at least 4 more than one and a half times the longest row.
        decode_lengths: int64 `[num_decode_rows]`, tokens of context, the new one included.
        extends: The extend rows, in order of their tokens.
        sampled_tokens: int64 `[num_sampled]`, flat indices of the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    decode_page_tables: torch.Tensor
    decode_lengths: torch.Tensor
    extends: tuple[ExtendRow, ...]
    sampled_tokens: torch.Tensor


Prepared = TypeVar("Prepared")


class AttentionBackend(Protocol[Prepared]):
    """One implementation of attention over paged keys and values."""

    def prepare(self, step: StepTensors) -> Prepared:
        """Compute once a step what every layer needs."""
        ...

    def attend(
        self, prepared: Prepared, layer_pages: torch.Tensor, queries: torch.Tensor, keys_values: torch.Tensor
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend.

        Args:
            prepared: From `prepare`, of this step.
            layer_pages: The layer's pages `[num_pages, page_size, 2, num_kv_heads, head_dim]`, written in place.
            queries: `[num_tokens, num_heads, head_dim]`, rotated.
            keys_values: `[num_tokens, 2, num_kv_heads, head_dim]`, keys first and rotated.

        Returns:
            `[num_tokens, num_heads * head_dim]`, in memory of its own.
        """
        ...
