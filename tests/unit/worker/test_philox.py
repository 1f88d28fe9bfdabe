"""Goal: the generator is Philox4x32-10, and its numbers are uniform. Known answers: the Random123 library's."""

from __future__ import annotations

import numpy as np
import pytest

from services.worker.philox import philox4x32, uniforms

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    block = philox4x32(np.array(counter, dtype=np.uint64).reshape(4, 1), np.array(key, dtype=np.uint64).reshape(2, 1))
    assert tuple(block[:, 0].tolist()) == expected


def test_numbers_depend_on_seed_and_position_only() -> None:
    seeds = np.array([3, 2**64 - 1, 3], dtype=np.uint64)
    positions = np.array([10, 10, 11], dtype=np.int64)
    together = uniforms(seeds, positions)
    alone = [float(uniforms(seeds[row : row + 1], positions[row : row + 1])[0]) for row in range(3)]
    assert together.tolist() == alone
    assert len(set(alone)) == 3


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    """Chi-square over 64 cells; the bound is passed by chance once in 10⁶."""
    count = 64_000
    steps = np.arange(count)
    fixed = np.full(count, 77)
    for seeds, positions in ((fixed, steps), (steps, fixed)):
        values = uniforms(seeds.astype(np.uint64), positions.astype(np.int64))
        assert values.min() >= 0.0 and values.max() < 1.0
        cells = np.bincount((values * 64).astype(int), minlength=64)
        assert float(((cells - 1000) ** 2 / 1000).sum()) < 127
