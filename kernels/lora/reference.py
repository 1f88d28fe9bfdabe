"""The definition of `lora` in plain torch: low-rank adapters of a batch, an adapter a segment, added to a layer's output.

    shrink: h[t] = x[t] @ a[adapter].T            the first `ranks[adapter]` columns of each slice; float32
    expand: out[t] += scalings[adapter] * (h[t] @ b[adapter].T), slice by slice

Slices are the projections that one layer fuses: three for query, key and value, two for gate and up, one otherwise.

Source: Hu et al., LoRA (2021); batching over adapters: Chen et al., Punica (2023), Sheng et al., S-LoRA (2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

NO_ADAPTER = -1
"""Adapter of a segment without one: its tokens are left as they are."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Which adapter each token of a batch has.

    Attributes:
        starts: int32 `[num_segments + 1]`: segment i has places `starts[i] … starts[i + 1] - 1`.
        adapters: int32 `[num_segments]`; `NO_ADAPTER` for none. Segments do not overlap.
        order: int32 `[num_places]`: which token stands at a place, each at most once; without it, token i stands at place i. With
            it tokens of one adapter make one segment wherever they are, and its matrices are read once.
    """

    starts: torch.Tensor
    adapters: torch.Tensor
    order: torch.Tensor | None = None

    def tokens(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield the tokens and the adapter of each segment that has one."""
        for segment, adapter in enumerate(self.adapters.tolist()):
            if adapter != NO_ADAPTER:
                places = torch.arange(int(self.starts[segment]), int(self.starts[segment + 1]))
                yield (places if self.order is None else self.order[places].long()), adapter


def lora_shrink(x: torch.Tensor, a: torch.Tensor, ranks: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Project tokens down.

    Args:
        x: `[num_tokens, num_inputs]`.
        a: `[num_adapters, num_slices, rank_max, num_inputs]`; rows from an adapter's rank on are not read.
        ranks: int32 `[num_adapters]`.
        segments: Who has which.

    Returns:
        float32 `[num_tokens, num_slices, rank_max]`; zero from the rank on, and for tokens without an adapter.
    """
    out = torch.zeros(x.shape[0], *a.shape[1:3])
    for tokens, adapter in segments.tokens():
        rank = int(ranks[adapter])
        out[tokens, :, :rank] = torch.einsum("tk,srk->tsr", x[tokens].float(), a[adapter, :, :rank].float())
    return out


def lora_expand(
    h: torch.Tensor, b: Sequence[torch.Tensor], ranks: torch.Tensor, scalings: torch.Tensor, segments: Segments, out: torch.Tensor
) -> None:
    """Project tokens up and add to what is there, in float32, rounded once.

    Args:
        h: float32 `[num_tokens, num_slices, rank_max]`, from `lora_shrink`.
        b: For each slice `[num_adapters, width of the slice, rank_max]`; columns from an adapter's rank on are not read.
        ranks: int32 `[num_adapters]`.
        scalings: float32 `[num_adapters]`.
        segments: Who has which.
        out: `[num_tokens, sum of the slices' widths]`, added to; tokens without an adapter are not written.
    """
    for tokens, adapter in segments.tokens():
        rank, first = int(ranks[adapter]), 0
        for index, of_slice in enumerate(b):
            columns = slice(first, first + of_slice.shape[1])
            delta = h[tokens, index, :rank] @ of_slice[adapter, :, :rank].float().T
            out[tokens, columns] = (out[tokens, columns].float() + scalings[adapter].float() * delta).to(out.dtype)
            first = columns.stop
