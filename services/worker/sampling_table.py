"""How each sequence's tokens are drawn: its sampling parameters, in arrays indexed by slot."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from headrace.v1.common_pb2 import SamplingParams

Int64Array = npt.NDArray[np.int64]

PENALTY_MAX: Final = 2.0
BIAS_MAX: Final = 100.0


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Parameters of the tokens to be drawn, arrays in parallel; a slot comes as often as tokens are drawn for it.

    `positions` is the index of the token to be drawn in its whole sequence, so that a sequence that was computed anew from prompt
    and outputs draws the same tokens as before.
    """

    slots: Int64Array
    positions: Int64Array
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.uint64]


class SamplingTable:
    """Parameters of all slots."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._temperature = np.ones(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int32)
        self._top_p = np.ones(num_slots, dtype=np.float32)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seeds = np.zeros(num_slots, dtype=np.uint64)

    def enter(self, slot: int, sampling: SamplingParams, request_id: str) -> bool:
        """Keep a sequence's parameters; False when one is out of its documented range."""
        temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
        top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
        # An unseeded sequence must still draw the same tokens wherever it is computed again.
        seed = sampling.seed if sampling.HasField("seed") else zlib.crc32(request_id.encode())
        self._temperature[slot] = temperature
        self._top_k[slot] = max(sampling.top_k, 0)
        self._top_p[slot] = top_p
        self._min_p[slot] = sampling.min_p
        self._seeds[slot] = seed
        is_drawable = 0.0 <= temperature < float("inf") and 0.0 < top_p <= 1.0 and 0.0 <= sampling.min_p <= 1.0
        return is_drawable and _is_adjustable(sampling, self._vocab_size)

    def rows(self, slots: Int64Array, positions: Int64Array) -> SampledRows:
        """Parameters for tokens at these positions of these slots' sequences."""
        return SampledRows(
            slots=slots,
            positions=positions,
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            seeds=self._seeds[slots],
        )


def repetition_penalty(sampling: SamplingParams) -> float:
    """The repetition penalty; 1 where none is set."""
    return sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0


def is_penalised(sampling: SamplingParams) -> bool:
    """Whether a sequence's logits depend on which tokens it has."""
    return bool(sampling.frequency_penalty or sampling.presence_penalty or repetition_penalty(sampling) != 1.0)


def _is_adjustable(sampling: SamplingParams, vocab_size: int) -> bool:
    """Whether penalties and biases are in their documented ranges; a comparison with NaN fails."""
    penalties = sampling.frequency_penalty, sampling.presence_penalty, repetition_penalty(sampling)
    return (
        all(abs(penalty) <= PENALTY_MAX for penalty in penalties)
        and repetition_penalty(sampling) > 0
        and all(entry.token_id < vocab_size and abs(entry.bias) <= BIAS_MAX for entry in sampling.logit_bias)
    )
