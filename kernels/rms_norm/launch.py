"""Host side of RMS normalisation: checks, blocks, launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kernels.launching import FLOAT_TYPES, Arguments, Launch, LaunchConfig, next_power_of_2, planned
from kernels.rms_norm.kernel import rms_norm_kernel

HIDDEN_SIZE_MAX: Final = 32768
"""Elements of a row, which one program holds in registers."""

_TILE_MIN: Final = 1024
"""Elements of a program at least: short rows are taken several at a time."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Shape of a program's tile."""

    num_rows: int
    num_columns: int

    @property
    def config(self) -> LaunchConfig:
        """Warps such that a thread holds 32 elements at most."""
        return LaunchConfig(num_warps=min(max(self.num_rows * self.num_columns // 1024, 4), 32))


def blocks_of(hidden_size: int) -> Blocks:
    """Choose the tile for a row's length; it depends on nothing else, so that rows are summed alike in every batch."""
    num_columns = next_power_of_2(hidden_size)
    return Blocks(num_rows=max(_TILE_MIN // num_columns, 1), num_columns=num_columns)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float = 0.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalise rows.

    Args:
        x: `[num_tokens, hidden_size]`, or `[num_tokens, num_heads, head_dim]` with a norm a head. Rows may be strided.
        weight: `[hidden_size]` (`[head_dim]`).
        eps: Added to the mean square.
        weight_offset: Added to every weight.
        out: Where to; may be `x`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _plan("rms_norm", x, None, weight, out, eps, weight_offset)(x, None, weight, out)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add `x` to `residual`, in place there, and normalise the sum.

    Args:
        x: `[num_tokens, hidden_size]`; rows may be strided.
        residual: Likewise; becomes the sum.
        weight: `[hidden_size]`.
        eps: Added to the mean square.
        weight_offset: Added to every weight.
        out: Where the normalised sum goes; may be `x`. A new tensor by default.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: A shape, type, stride or device is wrong.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _plan("add_rms_norm", x, residual, weight, out, eps, weight_offset)(x, residual, weight, out)
    return out


@planned
def _plan(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    weight_offset: float,
) -> Launch:
    """Check the arguments, and plan the launch on `x`, `residual`, `weight`, `out`."""
    arguments = Arguments(op, x.device)
    if residual is None:
        arguments.require(x.dim() in (2, 3), "x", "2 or 3 dimensions", x.dim())
        arguments.tensor("x", x, shape=(None,) * x.dim(), dtypes=FLOAT_TYPES)
    else:
        arguments.tensor("x", x, shape=(None, None), dtypes=FLOAT_TYPES)
        arguments.tensor("residual", residual, shape=x.shape, dtypes=(x.dtype,))
    arguments.tensor("out", out, shape=x.shape, dtypes=(x.dtype,))
    hidden_size = x.shape[-1]
    arguments.tensor("weight", weight, shape=(hidden_size,), dtypes=FLOAT_TYPES)
    arguments.require(1 <= hidden_size <= HIDDEN_SIZE_MAX, "x", f"rows of 1 to {HIDDEN_SIZE_MAX} elements", hidden_size)
    num_heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * num_heads
    blocks = blocks_of(hidden_size)
    numbers = (
        num_rows,
        num_heads,
        hidden_size,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        out.stride(0),
        out.stride(1) if x.dim() == 3 else 0,
        eps,
        weight_offset,
    )
    constants = {"HAS_RESIDUAL": residual is not None, "ROWS": blocks.num_rows, "BLOCK": blocks.num_columns}
    return Launch(rms_norm_kernel, (-(-num_rows // blocks.num_rows),), numbers, constants, blocks.config)
