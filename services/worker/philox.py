"""Counter-based random numbers: the same (seed, position) gives the same number in any batch, process or machine.

Philox4x32 with ten rounds, keyed by the seed and counting positions, over arrays of rows. There is no state to carry, so a sequence
that is computed again elsewhere continues on its path, and a row's draw does not depend on its neighbours.

Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); known answers in the tests.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_MULTIPLIER_0: Final = np.uint64(0xD2511F53)
_MULTIPLIER_1: Final = np.uint64(0xCD9E8D57)
_WEYL_0: Final = np.uint64(0x9E3779B9)
_WEYL_1: Final = np.uint64(0xBB67AE85)
_MASK: Final = np.uint64(0xFFFFFFFF)
_WORD: Final = np.uint64(32)
_NUM_ROUNDS: Final = 10
_NUM_BITS: Final = 52


def philox4x32(counter: UInt64Array, key: UInt64Array) -> UInt64Array:
    """Compute a block of four 32-bit words for each row.

    Args:
        counter: `[4, num_rows]`, 32-bit words in 64-bit elements.
        key: `[2, num_rows]`, likewise.

    Returns:
        `[4, num_rows]`, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _WORD) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> _WORD) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: UInt64Array, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Draw a number in [0, 1) for each (seed, position); multiples of 2⁻⁵², so that scaling never rounds one up to the whole."""
    counts = positions.astype(np.uint64)
    zeros = np.zeros_like(counts)
    counter = np.stack((counts & _MASK, counts >> _WORD, zeros, zeros))
    words = philox4x32(counter, np.stack((seeds & _MASK, seeds >> _WORD)))
    bits: UInt64Array = ((words[1] << _WORD) | words[0]) >> np.uint64(64 - _NUM_BITS)
    return bits.astype(np.float64) * 2.0**-_NUM_BITS
