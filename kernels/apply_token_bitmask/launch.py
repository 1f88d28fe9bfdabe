"""Host side of excluding tokens by bits: checks, launch."""

from __future__ import annotations

from typing import Final

import torch

from kernels.apply_token_bitmask.kernel import apply_token_bitmask_kernel
from kernels.launching import FLOAT_TYPES, INDEX_TYPES, Arguments, LaunchConfig

BLOCK: Final = 4096
CONFIG: Final = LaunchConfig(num_warps=8)


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    """Set the logits of tokens whose bit is 0 to minus infinity, in place.

    Args:
        logits: `[num_rows, vocab_size]`; rows may be strided.
        bitmask: int32 `[num_masks, ceil(vocab_size / 32)]`; bit `t % 32` of word `t // 32` stands for token `t`, 1 allows it.
        rows: int32 or int64 `[num_masks]`: which row each mask is for; each row once at most. A negative one is padding.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("apply_token_bitmask", logits.device)
    arguments.tensor("logits", logits, shape=(None, None), dtypes=FLOAT_TYPES)
    arguments.tensor("rows", rows, shape=(None,), dtypes=INDEX_TYPES)
    num_masks, vocab_size = rows.shape[0], logits.shape[1]
    arguments.tensor("bitmask", bitmask, shape=(num_masks, -(-vocab_size // 32)), dtypes=(torch.int32,))
    if num_masks == 0 or vocab_size == 0:
        return
    apply_token_bitmask_kernel[(num_masks, -(-vocab_size // BLOCK))](
        logits,
        bitmask,
        rows,
        logits.shape[0],
        vocab_size,
        logits.stride(0),
        bitmask.stride(0),
        BLOCK=BLOCK,
        **CONFIG.options(),
    )
