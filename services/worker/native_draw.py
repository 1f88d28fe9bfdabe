"""Draws tokens by a native CPU kernel: those of `sampler.draw_tokens`, but where a draw is at a border to within rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.cpu import library as native
from services.worker.sampling_table import Int64Array, SampledRows


class NativeDraw:
    """See `sampler.Draw`. A row's token is the same to the last bit in any batch.

    Args:
        library: From `native.load_library`.
        vocab_size: Logits a row.
        isa: Number of the instruction set; None for the best that this CPU has.
    """

    def __init__(self, library: Any, vocab_size: int, *, isa: int | None = None) -> None:
        self._library = library
        self._vocab_size = vocab_size
        self._isa = library.hr_best_isa() if isa is None else isa
        self._scratch = native.aligned_zeros(library.hr_draw_scratch_bytes(vocab_size), np.uint8)

    def __call__(self, logits: torch.Tensor, rows: SampledRows, indices: Int64Array) -> Int64Array:
        """Draw."""
        assert logits.dtype == torch.float32 and logits.shape[1] == self._vocab_size and logits.stride(1) == 1
        tokens = np.empty(len(indices), dtype=np.int64)
        asked = native.DrawRows(
            num_drawn=len(indices),
            vocab_size=self._vocab_size,
            stride=logits.stride(0),
            logits=logits.data_ptr(),
            indices=indices.ctypes.data,
            temperature=rows.temperature.ctypes.data,
            top_k=rows.top_k.ctypes.data,
            top_p=rows.top_p.ctypes.data,
            min_p=rows.min_p.ctypes.data,
            seeds=rows.seeds.ctypes.data,
            positions=rows.positions.ctypes.data,
            tokens=tokens.ctypes.data,
        )
        self._library.hr_draw(self._isa, asked, self._scratch.ctypes.data)
        return tokens
