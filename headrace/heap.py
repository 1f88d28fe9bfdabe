"""The C library's heap: what a start freed is given back to the system.

Reading a tokenizer or a model makes a hundred thousand small objects that are gone when it is read. glibc keeps their memory in the
arena of the thread that read, for an allocation that may never come: 23 to 33 MiB in a tokenizer or detokenizer.
"""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Give back whole free pages of all arenas; takes some milliseconds. Where the C library is not glibc, nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
