"""Writing a step's keys and values to their places in the pages, in plain torch: the definition."""

from __future__ import annotations

import torch


def store_kv(keys: torch.Tensor, values: torch.Tensor, layer_pages: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write each token's keys and values to its slot; a token whose slot is no place of the pages is padding, and left out.

    Args:
        keys: `[num_tokens, num_kv_heads, head_dim]`.
        values: Likewise.
        layer_pages: `[num_pages, page_size, 2, num_kv_heads, head_dim]`, written in place.
        slot_mapping: `[num_tokens]`, `page * page_size + offset`, all different but for padding; padding is -1.
    """
    num_pages, page_size = layer_pages.shape[:2]
    is_token = (slot_mapping >= 0) & (slot_mapping < num_pages * page_size)
    slots = slot_mapping[is_token].long()
    pages, offsets = slots // page_size, slots % page_size
    layer_pages[pages, offsets, 0] = keys[is_token].to(layer_pages.dtype)
    layer_pages[pages, offsets, 1] = values[is_token].to(layer_pages.dtype)
