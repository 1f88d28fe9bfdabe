"""A time as text, as Anthropic's and Ollama's clients read it. Pure: the time comes in."""

from __future__ import annotations

import numpy as np


def utc_text(unix_ns: int, *, unit: str = "s") -> str:
    """A time in ISO 8601, for example 1970-01-01T00:00:07Z; `unit` is "s" or a finer one, such as "us"."""
    return f"{np.datetime64(unix_ns, 'ns').astype(f'datetime64[{unit}]')}Z"
