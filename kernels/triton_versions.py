"""The versions of Triton that the kernels are tried with: all tests under the interpreter, and all cases compiled.

The first is the one of constraints.txt and of RESOURCES.md: that which torch's builds for GPUs ask for by their exact version.
"""

from __future__ import annotations

from typing import Final

TRIED: Final = ("3.7.1", "3.9.0")
