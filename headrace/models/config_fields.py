"""Checked reading of one JSON object's fields, which remembers what was read.

An error names the file, the field and the value. What nobody has read when a network is built may be a field that changes what the
network computes: `unread` gives those, and the worker refuses or reports them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from headrace.errors import ModelError

PULL_AGAIN: Final = "pull the model again"
_SIZE_MAX: Final = (1 << 31) - 1

SIZES_MAX: Final[Mapping[str, int]] = {
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 25,
    "num_local_experts": 8192,
    "num_experts": 8192,
    "type_vocab_size": 1024,
}
"""Largest values of sizes that something is made of before the weights can contradict them: several times those of any published
model, so a larger one is damage. Others may be as large as a number of 32 bits."""


class ConfigFields:
    """One object's fields.

    Args:
        raw: The object.
        path: The file it came from, for errors.
        defaults: Values of fields that the object leaves out.
    """

    def __init__(self, raw: Mapping[str, Any], path: Path, *, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw = raw
        self.path = path
        self._values = {**(defaults or {}), **raw}
        self._read: set[str] = set()

    def unread(self) -> dict[str, Any]:
        """Fields of the object that nobody has asked for, without those that are null."""
        return {key: value for key, value in self.raw.items() if key not in self._read and value is not None}

    def bad(self, key: str, what: str) -> ModelError:
        """Make the error for a field: `what` follows its name."""
        return ModelError(f"{self.path}: {key} {what}; {PULL_AGAIN}", param=key)

    def unsupported(self, key: str, value: Any, supported: str) -> ModelError:
        """Make the error for a value that is no mistake but is not supported here."""
        return ModelError(f"{self.path}: {key} {value!r} is not supported; supported: {supported}", param=key)

    def get(self, key: str, default: Any = None) -> Any:
        """Read a value of any kind."""
        self._read.add(key)
        return self._values.get(key, default)

    def size(self, key: str, *, default: int | None = None) -> int:
        """Read a whole number from 1 to the limit in `SIZES_MAX`; null counts as left out."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.bad(key, "is missing")
        maximum = SIZES_MAX.get(key, _SIZE_MAX)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= maximum:
            raise self.bad(key, f"is {value!r}, not a whole number from 1 to {maximum}")
        return value

    def optional_size(self, key: str, *, default: int | None = None) -> int | None:
        """Read a whole number from 1; null, which is not the same as left out, is None."""
        return None if self.get(key, default) is None else self.size(key, default=default)

    def positive(self, key: str, *, default: float | None = None) -> float:
        """Read a number above 0."""
        value = self.get(key, default)
        if value is None:
            raise self.bad(key, "is missing")
        return self.checked_positive(key, value)

    def optional_positive(self, key: str, *, default: float | None = None) -> float | None:
        """Read a number above 0; null, which is not the same as left out, is None."""
        return None if self.get(key, default) is None else self.positive(key, default=default)

    def checked_positive(self, key: str, value: Any) -> float:
        """Check a number that is said to belong to `key`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.bad(key, f"is {value!r}, not a number above 0")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Read true or false; null counts as left out."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.bad(key, f"is {value!r}, not true or false")
        return default if value is None else value

    def text(self, key: str, *, default: str) -> str:
        """Read text."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, f"is {value!r}, not text")
        return value

    def list_of(self, key: str, kind: type, *, length: int | None = None) -> list[Any] | None:
        """Read a list whose items are all of a kind; null and left out are None.

        Args:
            key: Name of the field.
            kind: `int`, `str` or another type.
            length: How many items there have to be at least; None for any number.
        """
        value = self.get(key)
        if value is None:
            return None
        # To Python true and false are numbers; to a file they are not.
        if not isinstance(value, list) or not all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
            raise self.bad(key, f"is {value!r}, not a list of {kind.__name__}")
        if length is not None and len(value) < length:
            raise self.bad(key, f"has {len(value)} items for {length} layers")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Read one token id or several."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise self.bad(key, f"is {value!r}, not token ids from 0 to {vocab_size - 1}")
        return tuple(ids)
