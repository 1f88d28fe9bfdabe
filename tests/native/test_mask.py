"""Goal: the likeliest token that a mask allows is the one that looking at each of them finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 300, 4999])
def test_the_likeliest_allowed_is_the_first_of_the_largest(library: Any, vocab_size: int, share: float) -> None:
    random = np.random.default_rng(vocab_size)
    for _ in range(20):
        # Few different numbers, so that there are equals; bits beyond the vocabulary are set and mean nothing.
        logits = random.integers(-5, 5, vocab_size).astype(np.float32)
        bits = np.ones(-(-vocab_size // 32) * 32, dtype=np.bool_)
        bits[:vocab_size] = random.random(vocab_size) < share
        mask = np.packbits(bits, bitorder="little").view(np.int32)
        found = library.hr_likeliest_allowed(logits.ctypes.data, mask.ctypes.data, vocab_size)
        allowed = np.flatnonzero(bits[:vocab_size])
        assert found == (allowed[logits[allowed].argmax()] if len(allowed) else -1)


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_token_is_found_though_no_logit_is_a_number(library: Any, value: float) -> None:
    logits = np.full(100, value, dtype=np.float32)
    mask = np.zeros(4, dtype=np.int32)
    mask[2] = 1 << 5 | 1 << 9
    assert library.hr_likeliest_allowed(logits.ctypes.data, mask.ctypes.data, 100) in (69, 73)
