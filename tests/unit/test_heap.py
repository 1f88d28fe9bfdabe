"""Giving freed memory back."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest

from headrace.heap import trim_heap

LIBRARY = ctypes.CDLL(None)
BLOCK_BYTES = 16 << 10
NUM_BLOCKS = 4000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not hasattr(LIBRARY, "malloc_trim"), reason="the C library is not glibc, whose heap this is about")
def test_memory_freed_below_a_block_in_use_is_given_back() -> None:
    LIBRARY.malloc.restype, LIBRARY.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    LIBRARY.free.restype, LIBRARY.free.argtypes = None, [ctypes.c_void_p]
    blocks = [LIBRARY.malloc(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    for block in blocks[:-1]:
        LIBRARY.free(block)
    held = resident_bytes()
    trim_heap()
    assert held - resident_bytes() > NUM_BLOCKS * BLOCK_BYTES // 2
    LIBRARY.free(blocks[-1])


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    trim_heap()
