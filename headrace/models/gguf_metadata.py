"""Checked access to the metadata of one architecture in a GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.errors import ModelError
from headrace.models.gguf_file import GgufFile


class GgufMetadata:
    """Values under the architecture's prefix; errors name the file, the key and the value.

    Args:
        file: The file.
        prefix: Name of the architecture: the key `block_count` stands in the file as `llama.block_count`.
    """

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the file has this key."""
        return f"{self._prefix}.{key}" in self._file.metadata

    def get(self, key: str) -> Any:
        """Give a value as it is; None without one."""
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def integer(self, key: str, *, default: int | None = None) -> int:
        """Read a whole, non-negative number; a missing one without a default is an error."""
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.bad(key, value, "a whole number")
        return value

    def real(self, key: str, *, default: float | None = None) -> float:
        """Read a positive number as the shortest decimal that is the same float32: 1e-05, and not 9.999999747378752e-06."""
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.bad(key, value, "a number above 0")
        return shortest(value)

    def bad(self, key: str, value: Any, expected: str) -> ModelError:
        """The error for a value that is not what it should be."""
        return ModelError(
            f"{self._file.path}: GGUF metadata {self._prefix}.{key} is {value!r}, not {expected}; pull the model again"
        )


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))
