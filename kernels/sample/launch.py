"""Host side of sampling: checks, blocks, launches."""

from __future__ import annotations

from typing import Final

import torch

from kernels.apply_token_bitmask.launch import apply_token_bitmask
from kernels.launching import INDEX_TYPES, Arguments, LaunchConfig, next_power_of_2
from kernels.sample.inputs import Adjustments, SamplingRows
from kernels.sample.kernel import sample_adjust_kernel, sample_draw_kernel

BITS: Final = 2
"""Bits of a threshold that one pass over a row settles."""

ADJUST_BLOCK: Final = 256
ADJUST_CONFIG: Final = LaunchConfig(num_warps=4)
DRAW_CONFIG: Final = LaunchConfig(num_warps=16)

NEAR: Final = 4096
"""Tokens of a row that are listed at most, where top-k or top-p leave so few."""

_BLOCK_MAX: Final = 4096


def block_of(vocab_size: int) -> int:
    """Tokens that a program looks at together; by the vocabulary alone, so that sums run alike in every batch."""
    return min(next_power_of_2(vocab_size), _BLOCK_MAX)


def num_blocks_of(vocab_size: int) -> int:
    """Blocks of a row, as a power of 2."""
    return next_power_of_2(-(-vocab_size // block_of(vocab_size)))


def adjust(logits: torch.Tensor, adjustments: Adjustments) -> None:
    """Apply penalties and biases, in place.

    Args:
        logits: float32 `[num_rows, vocab_size]`; rows may be strided.
        adjustments: What to apply. An entry whose token is not of the vocabulary is left out.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("sample", logits.device)
    arguments.tensor("logits", logits, shape=(None, None), dtypes=(torch.float32,))
    num_rows, num_entries = logits.shape[0], adjustments.tokens.shape[0]
    arguments.tensor("starts", adjustments.starts, shape=(num_rows + 1,), dtypes=INDEX_TYPES)
    arguments.tensor("tokens", adjustments.tokens, shape=(num_entries,), dtypes=INDEX_TYPES)
    arguments.tensor("output_counts", adjustments.output_counts, shape=(num_entries,), dtypes=(torch.int32,))
    arguments.tensor("is_seen", adjustments.is_seen, shape=(num_entries,), dtypes=(torch.bool,))
    arguments.tensor("biases", adjustments.biases, shape=(num_entries,), dtypes=(torch.float32,))
    for name in ("repetition", "frequency", "presence"):
        arguments.tensor(name, getattr(adjustments, name), shape=(num_rows,), dtypes=(torch.float32,))
    within = 0 <= adjustments.max_entries <= num_entries
    arguments.require(within, "max_entries", f"0 to num_entries = {num_entries}", adjustments.max_entries)
    if num_rows == 0 or adjustments.max_entries == 0:
        return
    sample_adjust_kernel[(num_rows, -(-adjustments.max_entries // ADJUST_BLOCK))](
        logits,
        adjustments.starts,
        adjustments.tokens,
        adjustments.output_counts,
        adjustments.is_seen.view(torch.uint8),
        adjustments.biases,
        adjustments.repetition,
        adjustments.frequency,
        adjustments.presence,
        logits.shape[1],
        logits.stride(0),
        BLOCK=ADJUST_BLOCK,
        **ADJUST_CONFIG.options(),
    )


def sample(
    logits: torch.Tensor,
    rows: SamplingRows,
    *,
    adjustments: Adjustments | None = None,
    bitmask: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row.

    Args:
        logits: float32 `[num_rows, vocab_size]`; rows may be strided. Changed in place by adjustments and mask.
        rows: Parameters of the rows.
        adjustments: Penalties and biases, applied first.
        bitmask: Mask and rows of `apply_token_bitmask`, applied next.

    Returns:
        int64 `[num_rows]` token ids, and bool `[num_rows]`, whether the row could be sampled: no NaN, no plus infinity, and not
        all tokens excluded. Where it could not, the token is 0.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    arguments = Arguments("sample", logits.device)
    arguments.tensor("logits", logits, shape=(None, None), dtypes=(torch.float32,))
    num_rows, vocab_size = logits.shape
    arguments.require(vocab_size > 0, "logits", "a vocabulary of 1 token or more", vocab_size)
    for name in ("temperature", "top_p", "min_p"):
        arguments.tensor(name, getattr(rows, name), shape=(num_rows,), dtypes=(torch.float32,))
    arguments.tensor("top_k", rows.top_k, shape=(num_rows,), dtypes=(torch.int32,))
    for name in ("seeds", "positions"):
        arguments.tensor(name, getattr(rows, name), shape=(num_rows,), dtypes=(torch.int64,))
    if adjustments is not None:
        adjust(logits, adjustments)
    if bitmask is not None:
        apply_token_bitmask(logits, *bitmask)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_valid = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    near_logits = torch.empty((num_rows, NEAR), dtype=torch.float32, device=logits.device)
    near_tokens = torch.empty((num_rows, NEAR), dtype=torch.int32, device=logits.device)
    if num_rows > 0:
        sample_draw_kernel[(num_rows,)](
            tokens,
            is_valid.view(torch.uint8),
            logits,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.seeds,
            rows.positions,
            near_logits,
            near_tokens,
            vocab_size,
            logits.stride(0),
            NEAR=NEAR,
            BITS=BITS,
            NUM_BLOCKS=num_blocks_of(vocab_size),
            BLOCK=block_of(vocab_size),
            **DRAW_CONFIG.options(),
        )
    return tokens, is_valid
