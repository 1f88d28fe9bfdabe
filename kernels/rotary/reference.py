"""Rotary position embedding in plain torch: the definition, and the tables for every way of scaling.

Element pairs of a head turn by `position * frequency`. In NeoX layout the first half of the turned part pairs with the second, in
the interleaved one neighbours do. Only the first `2 * table width` elements of a head turn, the others stay (partial rotation).
Angles, cosines and sines are float32, the product is rounded once.

Source: Su et al., RoFormer (2021); linear: Chen et al., Position Interpolation (2023); llama3: Llama 3.1's published code; yarn:
Peng et al., YaRN (2023), equations 17 to 22.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def rotary(
    heads: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool
) -> torch.Tensor:
    """Turn heads.

    Args:
        heads: `[num_tokens, num_heads, head_dim]`.
        positions: `[num_tokens]`; a token whose position is not a row of the table is padding, and not turned.
        cos: float32 `[num_positions, rotary_dim / 2]`.
        sin: Likewise.
        is_interleaved: Neighbours pair, and not halves.

    Returns:
        The turned heads, of the same type.
    """
    is_token = (positions >= 0) & (positions < cos.shape[0])
    rows = positions.clamp(0, cos.shape[0] - 1).long()
    cosine, sine = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)
    half = cos.shape[1]
    turned = heads.float()
    if is_interleaved:
        first, second = turned[..., 0 : 2 * half : 2], turned[..., 1 : 2 * half : 2]
    else:
        first, second = turned[..., :half], turned[..., half : 2 * half]
    pairs = (first * cosine - second * sine, second * cosine + first * sine)
    part = torch.stack(pairs, dim=-1).flatten(-2) if is_interleaved else torch.cat(pairs, dim=-1)
    whole = torch.cat((part, turned[..., 2 * half :]), dim=-1).to(heads.dtype)
    return torch.where(is_token[:, None, None], whole, heads)


def table(
    rotary_dim: int, *, num_positions: int, theta: float, scaling: Mapping[str, float | str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cosines and sines, float32 `[num_positions, rotary_dim / 2]` each.

    Args:
        rotary_dim: Elements of a head that turn; even.
        num_positions: Rows.
        theta: Base of the frequencies.
        scaling: `rope_type` (`linear`, `llama3` or `yarn`) and its parameters, by their names in config.json; None for none.

    Raises:
        ValueError: The rope type is none of these.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / theta**exponents
    scaling = scaling or {"rope_type": "default"}
    kind, attention_factor = scaling["rope_type"], 1.0
    if kind == "linear":
        frequencies = frequencies / float(scaling["factor"])
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif kind == "yarn":
        frequencies, attention_factor = _yarn(frequencies, scaling, rotary_dim=rotary_dim, theta=theta)
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r} is none of default, linear, llama3, yarn")
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, float | str]) -> torch.Tensor:
    """Divide slow frequencies by `factor`, keep fast ones, and mix those between."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / float(scaling["factor"]))


def _yarn(
    frequencies: torch.Tensor, scaling: Mapping[str, float | str], *, rotary_dim: int, theta: float
) -> tuple[torch.Tensor, float]:
    """Divide frequencies that turn seldom over the original context, keep those that turn often; give attention's factor too."""
    factor = float(scaling["factor"])

    def index_of(num_turns: float) -> float:
        """Which frequency turns so many times over the original context."""
        ratio = float(scaling["original_max_position_embeddings"]) / (num_turns * 2 * math.pi)
        return rotary_dim * math.log(ratio) / (2 * math.log(theta))

    fast, slow = index_of(float(scaling.get("beta_fast", 32))), index_of(float(scaling.get("beta_slow", 1)))
    if scaling.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, rotary_dim - 1)
    width = slow - fast if slow != fast else 0.001
    divided = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - fast) / width).clamp(0.0, 1.0)
    scaled = frequencies * (1.0 - divided) + frequencies / factor * divided
    return scaled, _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: Mapping[str, float | str], factor: float) -> float:
    def growth(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return growth(float(scaling["mscale"])) / growth(float(scaling["mscale_all_dim"]))
    return growth(1.0)
