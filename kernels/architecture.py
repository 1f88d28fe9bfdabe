"""The GPU architectures that the kernels are compiled and checked for, and which of them a device is.

The list is closed: an architecture that is not here has no proof behind it and is refused, with the names of those that are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import torch


class UnsupportedArchitectureError(ValueError):
    """The device is of an architecture that the kernels are not compiled and checked for."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture, as far as choosing a configuration needs it.

    Attributes:
        name: `sm_90`, `gfx942` …
        backend: Triton's backend.
        target: Triton's name of it: 90, `gfx942`.
        warp_size: Threads of a warp (a wavefront on AMD).
        shared_bytes_max: Shared memory (LDS) that one block may ask for.
        registers_max: Vector registers that one thread may hold, accumulation registers included.
    """

    name: str
    backend: Literal["cuda", "hip"]
    target: int | str
    warp_size: int
    shared_bytes_max: int
    registers_max: int


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    each.name: each
    for each in (
        Architecture("sm_80", "cuda", 80, 32, 163 * 1024, 255),
        Architecture("sm_90", "cuda", 90, 32, 227 * 1024, 255),
        Architecture("sm_100", "cuda", 100, 32, 227 * 1024, 255),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * 1024, 512),
        Architecture("gfx950", "hip", "gfx950", 64, 160 * 1024, 512),
    )
}
"""By name: A100, H100 and H200, B200, MI300X, MI355X. Limits are the vendors' (CUDA programming guide, CDNA 3 and 4 ISA)."""

INTERPRETED: Final = ARCHITECTURES["sm_90"]
"""Whose configurations run on the CPU, under Triton's interpreter."""


@cache
def architecture_of(device: torch.device) -> Architecture:
    """Name the architecture of a device; a CPU stands for `INTERPRETED`.

    Raises:
        UnsupportedArchitectureError: The device is none of `ARCHITECTURES`.
    """
    if device.type == "cpu":
        return INTERPRETED
    if device.type != "cuda":
        raise UnsupportedArchitectureError(f"device type {device.type!r}: the kernels run on cuda (ROCm included) and cpu")
    if torch.version.hip is not None:
        # It names features too, after colons.
        name = str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
    if name not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"{device} is of architecture {name}; the kernels are compiled and checked for {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]
