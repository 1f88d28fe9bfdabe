"""Loads model directories one after another and prints, for each, what memory it took at most and what it keeps, in bytes.

Run by `test_load_memory.py` in a process of its own.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from services.worker import machine
from services.worker.loading import LoadOptions, load_runner


def memory_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def load(backend: str, directory: Path, pool: ThreadPoolExecutor) -> object:
    options = LoadOptions(
        directory=directory,
        backend=backend,
        num_threads=1,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        page_size=32,
        kv_cache_bytes=0,
        kv_cache_tokens=64,
    )
    return load_runner(options, cpu_flags=frozenset(), available_bytes=lambda: 1 << 40, map_parts=pool.map)


def main() -> None:
    torch.set_num_threads(1)
    backend, first, *others = sys.argv[1:]
    with ThreadPoolExecutor(2) as pool:
        with machine.short_lived_blocks():
            # What torch and its libraries touch when they are first used is theirs. Nothing that was loaded goes again.
            kept = [load(backend, Path(first), pool)]
        for directory in map(Path, others):
            before = memory_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            with machine.short_lived_blocks():
                kept.append(load(backend, directory, pool))
            peak = memory_bytes("VmHWM")
            print(directory.name, peak - before, memory_bytes("VmRSS") - before)


if __name__ == "__main__":
    main()
