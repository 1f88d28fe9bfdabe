"""From logits to tokens: adjustments, temperature, top-k, top-p, min-p, in this order, each row with its own parameters.

A greedy row (temperature 0) takes the largest logit. Any other row draws by inverting the cumulative distribution, in order of
token ids, at a number that depends on nothing but (seed, position): see `philox.py`. What stands between logits and draw is
computed row by row, so a row's token is independent of its batch wherever its logits are. Tokens that tie with the last one kept
by top-k or top-p are kept with it: which of equals would go must not depend on a sort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from services.worker.layers.ops import Best
from services.worker.philox import uniforms
from services.worker.sampling_table import Int64Array, SampledRows

# Nearly always the nucleus lies in this many likeliest tokens, and finding them is ten times cheaper than a whole sort.
_NUM_CANDIDATES: Final = 512
_LEAST_EXPONENT: Final = -87.0
_LEAST_TARGET: Final = 1e-30
"""A token that is out has a mass of 1e-38 beside the likeliest's 1; a million of them together do not reach the least target."""


class LogitAdjustment(Protocol):
    """Changes logits before anything is drawn from them: penalties and biases."""

    def adjust(self, logits: torch.Tensor, rows: SampledRows) -> Int64Array:
        """Change the logits of some rows in place.

        Args:
            logits: float32 `[num_rows, vocab_size]`; after earlier adjustments a token that is ruled out has minus infinity.
            rows: Whose they are. A slot comes as often as tokens are drawn for it.

        Returns:
            Indices of the rows that were changed, strictly ascending.
        """
        ...


class TokenMasks(Protocol):
    """Rules tokens out, after all adjustments."""

    def rule_out(self, logits: torch.Tensor, rows: SampledRows, likeliest: Int64Array) -> None:
        """Rule out tokens of some rows: in `likeliest` for greedy rows, which need no more, and in the logits of all others.

        Args:
            logits: float32 `[num_rows, vocab_size]`, to be changed in place.
            rows: Whose they are.
            likeliest: The likeliest token of each row, to be replaced where it is ruled out.
        """
        ...


Draw = Callable[[torch.Tensor, SampledRows, Int64Array], Int64Array]
"""Draws a token for each of some rows: from the logits and the parameters of all rows, and the indices of these among them."""


def sample(
    logits: torch.Tensor,
    rows: SampledRows,
    best: Best | None = None,
    adjustments: Sequence[LogitAdjustment] = (),
    *,
    masks: TokenMasks | None = None,
    draw: Draw | None = None,
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """Choose a token for each row of logits.

    Args:
        logits: float32 `[num_rows, vocab_size]`; changed where an adjustment changes it.
        rows: Parameters of the rows.
        best: What `Network.best` found; None to look for it here.
        adjustments: What changes the logits first, in this order.
        masks: What rules tokens out then.
        draw: What draws; None for `draw_tokens`.

    Returns:
        Token ids, and whether the row's logits were finite before any adjustment; where they were not, the token means nothing.
    """
    # A sum is finite only if all its terms are, and is one pass.
    token_ids, is_finite = best or (logits.argmax(dim=-1).numpy(), torch.isfinite(logits.sum(dim=-1)).numpy())
    changed = [adjustment.adjust(logits, rows) for adjustment in adjustments]
    if any(len(indices) for indices in changed):
        greedy = np.unique(np.concatenate(changed))
        greedy = greedy[rows.temperature[greedy] == 0]
        token_ids[greedy] = logits[torch.from_numpy(greedy)].argmax(dim=-1).cpu().numpy()
    if masks is not None:
        masks.rule_out(logits, rows, token_ids)
    (drawn,) = np.nonzero((rows.temperature > 0) & is_finite)
    if len(drawn):
        token_ids[drawn] = (draw or draw_tokens)(logits, rows, drawn)
    return token_ids, is_finite


def logits_of(logits: torch.Tensor, indices: Int64Array) -> torch.Tensor:
    """The logits of some rows, ascending; not a copy where these are all."""
    return logits if len(indices) == len(logits) else logits[torch.from_numpy(indices)]


def draw_tokens(logits: torch.Tensor, rows: SampledRows, indices: Int64Array) -> Int64Array:
    """Draw by torch's operations on the CPU; see `Draw`."""
    logits = logits_of(logits, indices)
    temperature = torch.from_numpy(rows.temperature[indices]).unsqueeze(1)
    # The largest becomes 0 before it is divided, so that the smallest temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    top_k, top_p, min_p = rows.top_k[indices], rows.top_p[indices], rows.min_p[indices]
    if top_k.any():
        scaled = _keep_top_k(scaled, torch.from_numpy(top_k))
    if (top_p < 1).any():
        scaled = _keep_top_p(scaled, torch.from_numpy(top_p))
    if min_p.any():
        # Relative to the largest, which is 0; the logarithm of 0 keeps all.
        scaled = scaled.masked_fill(scaled < torch.from_numpy(min_p).log().unsqueeze(1), -torch.inf)
    # The exponential of minus infinity takes four times as long as that of a number, and most of a masked row is that.
    cumulative = scaled.clamp_(min=_LEAST_EXPONENT).exp().double().cumsum(dim=-1)
    targets = torch.from_numpy(uniforms(rows.seeds[indices], rows.positions[indices])).unsqueeze(1) * cumulative[:, -1:]
    targets.clamp_(min=_LEAST_TARGET)
    # The first token whose cumulative mass is above the target; one without mass of its own never is.
    token_ids: Int64Array = torch.searchsorted(cumulative, targets, right=True).squeeze(1).numpy()
    return token_ids


def _keep_top_k(scaled: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Drop what is smaller than the k-th largest; 0 keeps all."""
    vocab_size = scaled.shape[1]
    limited = (top_k > 0) & (top_k < vocab_size)
    if not bool(limited.any()):
        return scaled
    largest = scaled.topk(int(top_k[limited].max()), dim=-1).values
    kth = largest.gather(1, torch.where(limited, top_k.long() - 1, 0).unsqueeze(1))
    return scaled.masked_fill((scaled < kth) & limited.unsqueeze(1), -torch.inf)


def _keep_top_p(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the fewest likeliest tokens whose mass reaches `top_p`."""
    thresholds = torch.full_like(top_p, -torch.inf)
    totals = scaled.exp().sum(dim=-1)
    open_rows = (top_p < 1).nonzero().squeeze(1)
    for num_candidates in (min(_NUM_CANDIDATES, scaled.shape[1]), scaled.shape[1]):
        largest = scaled[open_rows].topk(num_candidates, dim=-1).values
        mass_before = largest.exp().cumsum(dim=-1) / totals[open_rows].unsqueeze(1) - largest.exp() / totals[open_rows].unsqueeze(1)
        num_kept = (mass_before < top_p[open_rows].unsqueeze(1)).sum(dim=-1)
        is_settled = (num_kept < num_candidates) | (num_candidates == scaled.shape[1])
        kept_last = largest.gather(1, (num_kept - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        thresholds[open_rows[is_settled]] = kept_last[is_settled]
        open_rows = open_rows[~is_settled]
        if len(open_rows) == 0:
            break
    return scaled.masked_fill(scaled < thresholds.unsqueeze(1), -torch.inf)
