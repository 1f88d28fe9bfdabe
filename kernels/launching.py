"""What all host wrappers share: how a kernel is configured, and the checks of their arguments.

A wrong argument is told by `KernelArgumentError` with the op, the argument's name, what was expected and what was got. Checks read
sizes and types on the host and never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from kernels.interpreting import is_interpreted

FLOAT_TYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
"""What activations may be."""

INDEX_TYPES: Final = (torch.int32, torch.int64)
"""What page tables, slots and lengths may be."""


class KernelArgumentError(ValueError):
    """An argument of a kernel has a shape, type, stride or device that the kernel does not take."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How a kernel is compiled beside its constants.

    Attributes:
        num_warps: Warps of a program.
        num_stages: Depth of software pipelining of its loops.
    """

    num_warps: int
    num_stages: int = 1

    def options(self) -> dict[str, Any]:
        """Give the options of a launch, which are those of ahead-of-time compilation too. Multiply and add may be fused."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class Arguments:
    """Checks the arguments of one call.

    Args:
        op: Name of the op, which opens every message.
        device: Where all tensors must be.

    Raises:
        KernelArgumentError: It is a CPU, and kernels are not interpreted.
    """

    def __init__(self, op: str, device: torch.device) -> None:
        self._op = op
        self._device = device
        if device.type == "cpu" and not is_interpreted():
            raise KernelArgumentError(f"{op}: on a CPU kernels run under Triton's interpreter: start with TRITON_INTERPRET=1")

    def tensor(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        shape: Sequence[int | None],
        dtypes: Sequence[torch.dtype],
        is_dense_last: bool = True,
        is_contiguous: bool = False,
    ) -> None:
        """Check one tensor.

        Args:
            name: The argument's name.
            tensor: Its value.
            shape: Sizes it must have; None takes any.
            dtypes: Types it may have.
            is_dense_last: Elements of the last dimension must be neighbours (stride 1).
            is_contiguous: All of it must be.

        Raises:
            KernelArgumentError: It is otherwise.
        """
        got = tuple(tensor.shape)
        if len(got) != len(shape) or any(want is not None and want != size for want, size in zip(shape, got, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            self.refuse(name, f"shape ({wanted})", f"shape {got}")
        if tensor.dtype not in dtypes:
            self.refuse(name, " or ".join(str(each) for each in dtypes), str(tensor.dtype))
        if tensor.device != self._device:
            self.refuse(name, f"device {self._device}", f"device {tensor.device}")
        if is_contiguous and not tensor.is_contiguous():
            self.refuse(name, "a contiguous tensor", f"strides {tensor.stride()} of shape {got}")
        if is_dense_last and tensor.numel() > 0 and got and got[-1] > 1 and tensor.stride(-1) != 1:
            self.refuse(name, "stride 1 in the last dimension", f"strides {tensor.stride()}")

    def require(self, is_met: bool, name: str, expected: str, got: object) -> None:
        """Check one condition that is no tensor's shape or type."""
        if not is_met:
            self.refuse(name, expected, str(got))

    def refuse(self, name: str, expected: str, got: str) -> None:
        """Raise for one argument.

        Raises:
            KernelArgumentError: Always.
        """
        raise KernelArgumentError(f"{self._op}: {name} must have or be {expected}, got {got}")


def next_power_of_2(value: int) -> int:
    """Round up to a power of 2; at least 1."""
    return 1 << max(value - 1, 0).bit_length()
