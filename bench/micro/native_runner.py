"""A runner on the native CPU kernels, for what measures steps without links."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from services.worker import machine
from services.worker.loading import LoadOptions, load_runner
from services.worker.model_runner import ModelRunner

PAGE_SIZE: Final = 32


def load_native_runner(
    directory: Path, *, num_threads: int, num_rows_max: int, sequence_tokens: int, max_num_batched_tokens: int
) -> ModelRunner:
    """Load a model, native or not at all, with pages for that many sequences of that length."""
    options = LoadOptions(
        directory=directory,
        backend="native",
        num_threads=num_threads,
        dtype="auto",
        max_model_len=sequence_tokens,
        max_num_seqs=num_rows_max,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=PAGE_SIZE,
        kv_cache_bytes=0,
        kv_cache_tokens=num_rows_max * sequence_tokens,
    )
    runner, _ = load_runner(options, cpu_flags=machine.cpu_flags(), available_bytes=machine.available_memory_bytes)
    return runner
