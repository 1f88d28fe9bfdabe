"""Attention block by block, in Triton: what the attention kernels share.

Scores are kept times log2(e), so that powers of two serve; the running state of a query is the largest score so far, the sum of
powers less it, and the values weighted likewise. A block of which a query sees nothing leaves its state as it was, bit for bit.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Dao et al., FlashAttention (2022).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def score(queries, keys, scale, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """Compute float32 `[M, N]` of `queries: [M, D]` and `keys: [N, D]`, which times `factor_of` are the scores times log2(e)."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if HAS_SOFT_CAP:
        # tanh z = 1 - 2 / (1 + exp 2z), also where exp overflows.
        scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * (scores * scale) / soft_cap)))
    return scores


@triton.jit
def factor_of(scale, HAS_SOFT_CAP: tl.constexpr):
    """What the numbers of `score` still have to be multiplied by. It is positive."""
    return LOG2_E if HAS_SOFT_CAP else scale * LOG2_E


@triton.jit
def absorb(scores, factor, values, maximum, total, weighted):
    """Take one block in.

    Args:
        scores: float32 `[M, N]`, minus infinity where a query does not see a key.
        factor: What scores have to be multiplied by, positive: the product and the difference that follows are one operation.
        values: `[N, D]`; finite where nobody sees them too.
        maximum: float32 `[M]`, of scores times the factor.
        total: float32 `[M]`.
        weighted: float32 `[M, D]`.

    Returns:
        The new `maximum`, `total` and `weighted`.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * factor)
    # A query that has seen nothing yet: anything finite keeps its powers at 0.
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    powers = tl.exp2(scores * factor - reference[:, None])
    shrink = tl.exp2(maximum - reference)
    total = total * shrink + tl.sum(powers, axis=1)
    weighted = weighted * shrink[:, None]
    weighted = tl.dot(powers.to(values.dtype), values, weighted, input_precision="ieee")
    return new_maximum, total, weighted


@triton.jit
def add_sink(sink, maximum, total):
    """Let a sink take its share; gives the new largest score, the new sum, and what the weighted values must be multiplied by."""
    sink = sink * LOG2_E
    new_maximum = tl.maximum(maximum, sink)
    shrink = tl.exp2(maximum - new_maximum)
    return new_maximum, total * shrink + tl.exp2(sink - new_maximum), shrink
