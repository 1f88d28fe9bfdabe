"""Host side of storing keys and values: checks, blocks, launch."""

from __future__ import annotations

from typing import Final

import torch

from kernels.launching import FLOAT_TYPES, INDEX_TYPES, Arguments, Launch, LaunchConfig, next_power_of_2, planned
from kernels.store_kv.kernel import store_kv_kernel

CONFIG: Final = LaunchConfig(num_warps=4)

_BLOCK_MAX: Final = 1024


def block_of(row_size: int) -> int:
    """Elements of keys, and as many of values, of a program."""
    return min(next_power_of_2(row_size), _BLOCK_MAX)


def store_kv(keys: torch.Tensor, values: torch.Tensor, layer_pages: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write each token's keys and values to its slot.

    Args:
        keys: `[num_tokens, num_kv_heads, head_dim]`; tokens and heads may be strided.
        values: Likewise.
        layer_pages: `[num_pages, page_size, 2, num_kv_heads, head_dim]`, written in place.
        slot_mapping: int32 or int64 `[num_tokens]`, `page * page_size + offset`; -1 is padding, which is left out.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    _plan(keys, values, layer_pages, slot_mapping)(keys, values, layer_pages, slot_mapping)


@planned
def _plan(keys: torch.Tensor, values: torch.Tensor, layer_pages: torch.Tensor, slot_mapping: torch.Tensor) -> Launch:
    """Check the arguments, and plan the launch on them."""
    arguments = Arguments("store_kv", keys.device)
    arguments.tensor("keys", keys, shape=(None, None, None), dtypes=FLOAT_TYPES)
    arguments.tensor("values", values, shape=keys.shape, dtypes=(keys.dtype,))
    num_tokens, num_heads, head_dim = keys.shape
    arguments.tensor("layer_pages", layer_pages, shape=(None, None, 2, num_heads, head_dim), dtypes=(keys.dtype,))
    arguments.tensor("slot_mapping", slot_mapping, shape=(num_tokens,), dtypes=INDEX_TYPES)
    row_size = num_heads * head_dim
    num_pages, page_size = layer_pages.shape[:2]
    block = block_of(row_size)
    numbers = (num_pages * page_size, row_size, *keys.stride()[:2], *values.stride()[:2], *layer_pages.stride()[:4])
    constants = {"PAGE_SIZE": page_size, "HEAD_DIM": head_dim, "BLOCK": block}
    return Launch(store_kv_kernel, (num_tokens, -(-row_size // block)), numbers, constants, CONFIG)
