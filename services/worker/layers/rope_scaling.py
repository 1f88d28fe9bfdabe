"""Frequencies of rotary embedding: plain, and scaled so that a model reaches further than it was trained.

Some ways of scaling depend on how long a sequence is. Keys stay in their pages while a sequence grows, and pages are shared between
sequences, so one choice has to serve all: `dynamic` and `longrope` take the longest sequence that the worker was set to
(`model.max_model_len`). A worker set to no more than the context before scaling computes as the model did before scaling.

Sources: Su et al., RoFormer (2021); linear: Chen et al. (2023); dynamic: NTK-aware scaling, bloc97 and emozilla (2023); yarn: Peng
et al. (2023); llama3: Llama 3.1's reference code; longrope: Ding et al. (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from headrace.errors import ModelError
from headrace.models.model_config import RopeConfig

_PARAM: Final = "rope_scaling"


@dataclass(frozen=True, slots=True, eq=False)
class RopeFrequencies:
    """What a position turns by.

    Attributes:
        inverse: float32 `[rotary_dim / 2]`, radians a position.
        attention_factor: Factor of cosines and sines; its square acts on the scores.
    """

    inverse: torch.Tensor
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class RopeLengths:
    """How long sequences are, in tokens: `context` by config.json, `longest` by the worker's settings."""

    context: int
    longest: int


class _Parameters:
    """Checked access to one rope type's parameters."""

    def __init__(self, rope: RopeConfig) -> None:
        self.theta = rope.theta
        self._values = rope.scaling or {}

    def check_names(self, rope_type: str, known: tuple[str, ...]) -> None:
        unknown = sorted(self._values.keys() - {"rope_type", *known})
        if unknown:
            takes = ", ".join(known) or "none"
            raise ModelError(
                f"{_PARAM} has {', '.join(unknown)}, which rope type {rope_type!r} does not take (it takes {takes})", param=_PARAM
            )

    def number(self, name: str, *, default: float | None = None, above: float = 0.0) -> float:
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
            raise ModelError(f"{_PARAM} {name} is {value!r}, not a number above {above:g}", param=_PARAM)
        return float(value)

    def optional(self, name: str) -> float | None:
        return self.number(name) if name in self._values else None

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{_PARAM} {name} is {value!r}, not true or false", param=_PARAM)
        return value

    def numbers(self, name: str, length: int) -> torch.Tensor:
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != length:
            raise ModelError(f"{_PARAM} {name} is not a list of {length} numbers, half of what is turned of a head", param=_PARAM)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (int, float)) or not 0 < item < math.inf:
                raise ModelError(f"{_PARAM} {name} holds {item!r}, not a number above 0", param=_PARAM)
        return torch.tensor(value, dtype=torch.float32)


def rope_frequencies(rope: RopeConfig, rotary_dim: int, lengths: RopeLengths) -> RopeFrequencies:
    """Compute the frequencies of a rope type.

    Raises:
        ModelError: The type is not supported, or a parameter is missing, unknown or out of range.
    """
    rope_type = "default" if rope.scaling is None else str(rope.scaling["rope_type"])
    known = _ROPE_TYPES.get(rope_type)
    if known is None:
        raise ModelError(f"rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}", param=_PARAM)
    parameters = _Parameters(rope)
    parameters.check_names(rope_type, known.names)
    return known.compute(parameters, rotary_dim, lengths)


def _plain(theta: float, rotary_dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def _default(parameters: _Parameters, rotary_dim: int, lengths: RopeLengths) -> RopeFrequencies:
    return RopeFrequencies(_plain(parameters.theta, rotary_dim))


def _linear(parameters: _Parameters, rotary_dim: int, lengths: RopeLengths) -> RopeFrequencies:
    return RopeFrequencies(_plain(parameters.theta, rotary_dim) / parameters.number("factor"))


def _dynamic(parameters: _Parameters, rotary_dim: int, lengths: RopeLengths) -> RopeFrequencies:
    """The base grows with the length, so that the slowest frequency reaches as far as the sequence."""
    factor = parameters.number("factor", above=1.0)
    if rotary_dim == 2:
        raise ModelError("rope type 'dynamic' needs more than 2 values of a head to turn", param=_PARAM)
    stretch = factor * max(lengths.longest, lengths.context) / lengths.context - (factor - 1)
    theta = parameters.theta * stretch ** (rotary_dim / (rotary_dim - 2))
    return RopeFrequencies(_plain(theta, rotary_dim))


def _llama3(parameters: _Parameters, rotary_dim: int, lengths: RopeLengths) -> RopeFrequencies:
    """Slow frequencies are divided by `factor`, fast ones kept, those between are a smooth mix."""
    factor = parameters.number("factor")
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if low >= high:
        raise ModelError(f"{_PARAM} low_freq_factor {low} is not below high_freq_factor {high}", param=_PARAM)
    plain = _plain(parameters.theta, rotary_dim)
    turns = parameters.number("original_max_position_embeddings") * plain / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return RopeFrequencies(plain * (share_kept + (1.0 - share_kept) / factor))


def _yarn(parameters: _Parameters, rotary_dim: int, lengths: RopeLengths) -> RopeFrequencies:
    """Pairs that turn often within the original context are kept, those that turn less than once are divided by `factor`."""
    origin = parameters.number("original_max_position_embeddings")
    factor = parameters.number("factor", default=lengths.context / origin)
    if parameters.theta <= 1:
        raise ModelError(f"rope_theta is {parameters.theta}; rope type 'yarn' needs more than 1", param="rope_theta")

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(origin / (times * 2 * math.pi)) / (2 * math.log(parameters.theta))

    first, last = (
        pair_that_turns(parameters.number("beta_fast", default=32.0)),
        pair_that_turns(parameters.number("beta_slow", default=1.0)),
    )
    if parameters.flag("truncate", default=True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    share_divided = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    plain = _plain(parameters.theta, rotary_dim)
    return RopeFrequencies(plain * (1.0 - share_divided) + plain / factor * share_divided, _yarn_factor(parameters, factor))


def _yarn_factor(parameters: _Parameters, factor: float) -> float:
    given = parameters.optional("attention_factor")
    if given is not None:
        return given

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = parameters.optional("mscale"), parameters.optional("mscale_all_dim")
    if numerator is not None and denominator is not None:
        return growth(numerator) / growth(denominator)
    return growth(1.0)


def _longrope(parameters: _Parameters, rotary_dim: int, lengths: RopeLengths) -> RopeFrequencies:
    """Each pair has a divisor of its own, one for contexts up to the original length and one for longer ones."""
    origin = parameters.number("original_max_position_embeddings", above=1.0)
    divisors = {name: parameters.numbers(name, rotary_dim // 2) for name in ("short_factor", "long_factor")}
    chosen = divisors["long_factor" if lengths.longest > origin else "short_factor"]
    attention_factor = parameters.optional("attention_factor")
    if attention_factor is None:
        factor = parameters.number("factor", default=lengths.context / origin)
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(origin)) if factor > 1 else 1.0
    return RopeFrequencies(_plain(parameters.theta, rotary_dim) / chosen, attention_factor)


@dataclass(frozen=True, slots=True)
class _RopeType:
    compute: Callable[[_Parameters, int, RopeLengths], RopeFrequencies]
    names: tuple[str, ...]


_ORIGIN: Final = "original_max_position_embeddings"
_ROPE_TYPES: Final[Mapping[str, _RopeType]] = {
    "default": _RopeType(_default, ()),
    "linear": _RopeType(_linear, ("factor",)),
    "dynamic": _RopeType(_dynamic, ("factor",)),
    "llama3": _RopeType(_llama3, ("factor", "low_freq_factor", "high_freq_factor", _ORIGIN)),
    "yarn": _RopeType(
        _yarn,
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGIN),
    ),
    "longrope": _RopeType(_longrope, ("short_factor", "long_factor", "factor", "attention_factor", _ORIGIN)),
}

ROPE_TYPES: Final = tuple(_ROPE_TYPES)
"""Supported types, as `rope_type` names them."""
