"""Cuts a matrix into runs of rows, small enough that what is made of a run on its way into the model costs little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_RUN_VALUES: Final = 1 << 18
"""Values a run, about: a MiB of float32."""


def row_runs(num_rows: int, num_columns: int, *, multiple: int = 1) -> Iterator[slice]:
    """Give runs of rows that follow one another, together all rows.

    Args:
        num_rows: Rows in all.
        num_columns: Values a row.
        multiple: Each run but the last has a multiple of so many rows.
    """
    step = max(1, _RUN_VALUES // max(1, num_columns * multiple)) * multiple
    return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))
