"""Threads that load parts of a model side by side, each computing alone.

Loading is thousands of small operations. Sharing each of them among threads costs a barrier each, which on a busy machine takes
longer than the operation; whole layers side by side meet only at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def load_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch computes with; torch itself computes with one meanwhile. After an error, nothing more is begun."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)
