"""What all host wrappers share: how a kernel is configured, the checks of their arguments, and launching again what was launched.

A step launches the same few kernels for layer after layer, step after step, on tensors of the same form at other addresses.
Checking, and all that Triton does between a call and the driver, takes several times as long as the driver itself, so both are
done once a form: a wrapper's `planned` part checks and gives a `Launch`, which is then called with the tensors alone.

A wrong argument is told by `KernelArgumentError` with the op, the argument's name, what was expected and what was got. Checks read
sizes and types on the host and never wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

import torch

from kernels.interpreting import is_interpreted

FLOAT_TYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
"""What activations may be."""

INDEX_TYPES: Final = (torch.int32, torch.int64)
"""What page tables, slots and lengths may be."""


_P = ParamSpec("_P")
_R = TypeVar("_R")

_FORMS_MAX: Final = 4096
"""Forms of one op that are remembered; past that all are forgotten, for the sake of memory."""

_forms_of_ops: Final[list[dict[Any, Any]]] = []


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


class Launch:
    """A kernel with all that follows from the form of its tensors, to be launched on any tensors of that form.

    Triton compiles a kernel for the types and alignments of its arguments, and for integers that are 1 or multiples of 16: all the
    same for tensors of one form. So the first launch asks Triton, and the others go to the driver with what it has found. Triton's
    hooks of launches are called by the first alone.

    Args:
        kernel: Under `@triton.jit`; takes tensors, then numbers, then constants.
        grid: Programs, up to three dimensions; with none of them nothing is launched.
        numbers: Arguments after the tensors.
        constants: Arguments after the numbers, by name.
        config: Warps and stages.
    """

    __slots__ = ("_again", "_config", "_constants", "_grid", "_kernel", "_numbers")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: Sequence[float],
        constants: dict[str, Any],
        config: LaunchConfig,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = tuple(numbers)
        self._constants = constants
        self._config = config
        self._again: Callable[..., None] | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on the current stream; tensors are of the form that this was planned for, and None where that had None."""
        if self._again is not None:
            self._again(*tensors)
            return
        if 0 in self._grid:
            return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants, **self._config.options())
        # Under the interpreter there is none.
        if compiled is not None:
            self._again = self._compiled(compiled, len(tensors))

    def _compiled(self, compiled: Any, num_tensors: int) -> Callable[..., None]:
        from triton.runtime import driver

        names = self._kernel.arg_names[num_tensors + len(self._numbers) :]
        rest = (*self._numbers, *(self._constants[name] for name in names))
        run, function, metadata, grid = compiled.run, compiled.function, compiled.packed_metadata, self._grid
        device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream

        def again(*tensors: torch.Tensor | None) -> None:
            run(*grid, stream_of(device), function, metadata, None, None, None, *tensors, *rest)

        return again


def planned(plan: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have `plan` called once for each form of its arguments, which are positional, and what it gave given again.

    A tensor counts by its type, shape, strides and device and by where it stands in 16 bytes, not by its numbers or its address;
    all else by its value. What raises is not remembered.
    """
    forms: dict[Any, Any] = {}
    is_tensor = torch.Tensor
    _forms_of_ops.append(forms)

    def find(*arguments: _P.args, **no_names: _P.kwargs) -> _R:
        key = tuple(
            [(x.dtype, x.shape, x.stride(), x.data_ptr() & 15, x.device) if isinstance(x, is_tensor) else x for x in arguments]
        )
        found: _R | None = forms.get(key)
        if found is None:
            if len(forms) >= _FORMS_MAX:
                forms.clear()
            found = forms[key] = plan(*arguments, **no_names)
        return found

    return find


def forget_plans() -> None:
    """Forget all forms: for tests that put something in the place of a kernel or of a constant."""
    for forms in _forms_of_ops:
        forms.clear()
