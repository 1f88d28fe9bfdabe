"""How many files and connections this process may have open at once. Shells give 1,024 where the kernel allows far more."""

from __future__ import annotations

import resource
from typing import Final

WANTED: Final = 65536
"""Enough for what any service holds; more costs programs that walk through all possible numbers."""


def open_files_limit() -> int:
    """The limit that holds now."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WANTED if limit == resource.RLIM_INFINITY else limit


def raise_open_files_limit() -> None:
    """Take as many as may be had without privileges, up to `WANTED`; a limit that is higher stays."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = WANTED if most == resource.RLIM_INFINITY else min(most, WANTED)
    if limit > open_files_limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
