"""How a kernel's result is held against its reference, and the inputs that find mistakes."""

from __future__ import annotations

import math
import mmap

import numpy as np
import torch

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
"""Largest ‖out − reference‖ / ‖reference‖ by the type of the result: about twice what one rounding to the type makes of it.

float32: some ten units in the last place, for sums in another order.
"""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
POISON_INTEGER = -77

MAP_NORESERVE = 0x4000
"""Linux's; mmap does not name it before Python 3.13."""


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, integers with `POISON_INTEGER` (bytes and booleans stay: they have no value of no meaning)."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(torch.nan) if tensor.dtype.itemsize > 1 else tensor
    return tensor.fill_(POISON_INTEGER) if tensor.dtype in (torch.int32, torch.int64, torch.int16) else tensor


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output to write into."""
    return poison_(torch.zeros(shape, dtype=dtype))


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖, in float64; NaN where either holds one; 0 for two of no elements."""
    out, reference = out.double(), reference.double()
    norm = float(reference.norm())
    return float((out - reference).norm()) / norm if norm else float((out - reference).norm())


def assert_matches(out: torch.Tensor, reference: torch.Tensor, *, bound: float | None = None) -> None:
    """Same shape and type, every element written, and an error within the type's bound (or the one given)."""
    assert out.shape == reference.shape
    assert out.dtype == reference.dtype
    assert torch.isfinite(out).all() or not torch.isfinite(reference).all(), (
        "not all of the output was written, or it is not finite"
    )
    limit = BOUNDS[out.dtype] if bound is None else bound
    error = relative_error(out, reference)
    assert error <= limit, f"relative error {error:.3g}, bound {limit:.3g}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Fresh normal numbers: another draw each run, printed with a failure by its seed (`torch.initial_seed()`)."""
    return (torch.randn(shape) * scale).to(dtype)


def strided(tensor: torch.Tensor, *, dim: int = 0, gap: int = 3) -> torch.Tensor:
    """The same values with `gap` poisoned elements after each slice of `dim`: strides that are not those of the shape."""
    inner = math.prod(tensor.shape[dim + 1 :])
    storage = poison_(torch.zeros((*tensor.shape[: dim + 1], inner + gap), dtype=tensor.dtype))
    view = storage.as_strided(tensor.shape, (*storage.stride()[: dim + 1], *tensor.stride()[dim + 1 :]))
    view.copy_(tensor)
    return view


def lazy_zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are touched, and are promised none: for offsets past 2³¹ without gigabytes.

    A GPU has the gigabytes.
    """
    if torch.get_default_device().type != "cpu":
        return torch.zeros(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)).view(dtype).view(shape)


def far_rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """`[3, *shape]`, zeros, 2³⁰ + 8 elements apart: the last row's offset is past 2³¹ while row and stride fit into 32 bits."""
    apart, size = 2**30 + 8, math.prod(shape)
    storage = lazy_zeros(2 * apart + size, dtype=dtype)
    return storage.as_strided((3, *shape), (apart, *torch.empty(shape, device="meta").stride()))
