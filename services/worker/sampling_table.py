"""How each sequence's tokens are drawn: its sampling parameters, in arrays indexed by slot."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.v1.common_pb2 import SamplingParams

Int64Array = npt.NDArray[np.int64]


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

    def __init__(self, num_slots: int) -> None:
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
        return 0.0 <= temperature < float("inf") and 0.0 < top_p <= 1.0 and 0.0 <= sampling.min_p <= 1.0

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
