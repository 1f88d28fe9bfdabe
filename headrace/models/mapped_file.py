"""A weight file in memory: mapped, read piece by piece, and let go of again.

Pages of a mapped file count as memory of the process while they are mapped. Whoever copies weights out of one lets go of each
piece, so that loading takes the room of the loaded model and not of the file beside it; the pages stay in the system's cache.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError

_PIECE_BYTES: Final = 1 << 19
"""Size of a piece that is copied before its pages are let go of: small enough for a core's cache."""
_AROUND_BYTES: Final = max(1 << 16, mmap.PAGESIZE)
"""Linux's fault_around_bytes unless set otherwise."""


class MappedFile:
    """A file that can be read but not written.

    Args:
        path: The file.
        kind: What it should be, for the error.

    Raises:
        ModelError: It cannot be opened, or is empty.
    """

    def __init__(self, path: Path, *, kind: str) -> None:
        try:
            with path.open("rb") as stream:
                self.data: Final = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read as {kind}: {error}; pull the model again") from error

    def __len__(self) -> int:
        return len(self.data)

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Give some bytes as they lie in the file, read-only."""
        return np.frombuffer(self.data, dtype=np.uint8, count=num_bytes, offset=offset)

    def copy(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Give some bytes in memory of their own; their pages of the file are let go of."""
        copied = np.empty(num_bytes, dtype=np.uint8)
        for first in range(0, num_bytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, num_bytes - first)
            copied[first : first + size] = self.view(offset + first, size)
            self._let_go(offset + first, size)
        return copied

    def _let_go(self, offset: int, num_bytes: int) -> None:
        # With the page that is read the system maps those around it; what of them is still to be read is mapped again then.
        first = offset // _AROUND_BYTES * _AROUND_BYTES
        end = min(-(-(offset + num_bytes) // _AROUND_BYTES) * _AROUND_BYTES, len(self))
        self.data.madvise(mmap.MADV_DONTNEED, first, end - first)
