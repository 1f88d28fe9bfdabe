"""From logits to tokens, in plain torch: the definition.

Penalties and biases first, then temperature, top-k, top-p and min-p in this order, then a draw by inverting the cumulative
distribution in order of token ids, at a number that depends on the seed and the position alone. Tokens as likely as the last one
kept are kept with it. Scores are float32, as the kernel has them; masses are float64.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); Holtzman et al., top-p (2020); Keskar et al., CTRL,
repetition penalty (2019).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch

from kernels.sample.inputs import Adjustments, SamplingRows

_MASK: Final = 0xFFFFFFFF
_NUM_BITS: Final = 52


def uniform(seed: int, position: int) -> float:
    """Draw a number in [0, 1) for a seed and a position: Philox4x32 with ten rounds, the upper 52 bits of the first two words."""
    counter = [position & _MASK, (position >> 32) & _MASK, 0, 0]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & _MASK,
            (first >> 32) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return float((counter[1] << 32 | counter[0]) >> (64 - _NUM_BITS)) * 2.0**-_NUM_BITS


def adjust(logits: torch.Tensor, adjustments: Adjustments) -> None:
    """Apply penalties and biases to float32 `logits: [num_rows, vocab_size]`, in place."""
    starts = adjustments.starts.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        part = slice(start, end)
        tokens, counts = adjustments.tokens[part].long(), adjustments.output_counts[part]
        values, repetition = logits[row, tokens], adjustments.repetition[row]
        penalised = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(adjustments.is_seen[part], penalised, values)
        values = values - adjustments.frequency[row] * counts - adjustments.presence[row] * (counts > 0)
        logits[row, tokens] = values + adjustments.biases[part]


def sample(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row.

    Args:
        logits: float32 `[num_rows, vocab_size]`; minus infinity excludes a token.
        rows: Parameters.

    Returns:
        int64 token ids, and bool, whether the row could be sampled: no NaN, no plus infinity, and not all excluded. Where it
        could not, the token is 0.
    """
    num_rows = logits.shape[0]
    tokens = torch.zeros(num_rows, dtype=torch.int64)
    is_valid = torch.zeros(num_rows, dtype=torch.bool)
    for row in range(num_rows):
        values = logits[row]
        is_valid[row] = bool((values < torch.inf).all() and (values > -torch.inf).any())
        if is_valid[row]:
            number = uniform(int(rows.seeds[row]) & 0xFFFFFFFFFFFFFFFF, int(rows.positions[row]))
            tokens[row] = choose(values, rows, row, number)
    return tokens, is_valid


def choose(values: torch.Tensor, rows: SamplingRows, row: int, number: float) -> int:
    """Choose one row's token of `values: [vocab_size]` at a number in [0, 1)."""
    temperature = rows.temperature[row]
    if temperature == 0:
        return int((values == values.max()).nonzero()[0])
    scaled = (values - values.max()) / temperature
    is_kept = scaled > -torch.inf
    top_k = int(rows.top_k[row])
    if 0 < top_k < len(scaled):
        is_kept &= scaled >= scaled.topk(top_k).values[-1]
    weights = scaled.double().exp() * is_kept
    if rows.top_p[row] < 1:
        wanted = rows.top_p[row].double() * weights.sum()
        order = scaled.sort(descending=True)
        masses = weights[order.indices].cumsum(0)
        # A token is kept while what is likelier falls short: that is up to the first whose mass, its equals included, reaches it.
        first = int((masses < wanted).sum().clamp(max=len(scaled) - 1))
        is_kept &= scaled >= order.values[first]
    if rows.min_p[row] > 0:
        is_kept &= scaled >= rows.min_p[row].log()
    cumulative = (scaled.double().exp() * is_kept).cumsum(0)
    return int((cumulative <= number * cumulative[-1]).sum())
