"""Runs of rows as one matrix, for tests."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from services.worker.quantization.quantized_matrix import QuantizedMatrix


def joined(runs: Iterable[QuantizedMatrix]) -> QuantizedMatrix:
    parts = list(runs)
    first = parts[0]
    assert {(part.bits, part.group_size, part.zero, part.scales.dtype) for part in parts} == {
        (first.bits, first.group_size, first.zero, first.scales.dtype)
    }
    minimums = [part.minimums for part in parts if part.minimums is not None]
    assert len(minimums) in (0, len(parts))
    return QuantizedMatrix(
        codes=np.concatenate([part.codes for part in parts]),
        bits=first.bits,
        group_size=first.group_size,
        scales=np.concatenate([part.scales for part in parts]),
        zero=first.zero,
        minimums=np.concatenate(minimums) if minimums else None,
    )
