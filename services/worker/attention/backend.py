"""What the torch operations ask of an attention backend.

A backend prepares once a step what all layers share (`prepare`), then each layer stores its new keys and values and attends over
the pages (`attend`).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from services.worker.layers.ops import AttentionSpec, StepTensors

Prepared = TypeVar("Prepared")


class AttentionBackend(Protocol[Prepared]):
    """One implementation of attention over paged keys and values."""

    def prepare(self, step: StepTensors) -> Prepared:
        """Compute once a step what every layer needs."""
        ...

    def attend(
        self,
        prepared: Prepared,
        layer_pages: torch.Tensor,
        queries: torch.Tensor,
        keys_values: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend.

        Args:
            prepared: From `prepare`, of this step.
            layer_pages: The layer's pages `[num_pages, page_size, 2, num_kv_heads, head_dim]`, written in place.
            queries: `[num_tokens, num_heads, head_dim]`, rotated.
            keys_values: `[num_tokens, 2, num_kv_heads, head_dim]`, keys first and rotated.
            spec: The layer.

        Returns:
            `[num_tokens, num_heads * head_dim]`, in memory of its own.
        """
        ...
