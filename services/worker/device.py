"""What the worker asks of a device beside arithmetic: free memory, staging memory, captured graphs, a second stream.

`HostDevice` is the CPU; `GpuDevice` is one GPU, CUDA's or ROCm's, for which torch has one interface, `torch.cuda`. That module is
handed in, so that a stand-in shows on any machine what is asked of it. Knows nothing of models or steps.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from headrace.errors import ConfigError
from kernels.architecture import UnsupportedArchitectureError, architecture_of
from services.worker import machine

INSTALL_HINT: Final = "install torch's build for the GPU (README.md, Installing torch)"


class Fence(Protocol):
    """A place in the device's queue of work, which the host can wait for."""

    def record(self) -> None:
        """Put it behind all work so far."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...


class Graph(Protocol):
    """Captured work, which is launched as one."""

    def replay(self) -> None:
        """Launch it, over the same memory as when it was captured."""
        ...


class Device(Protocol):
    """One device, as far as the worker needs it.

    Attributes:
        name: `cpu`, `cuda` or `rocm`.
        torch_device: Where tensors live.
        can_capture: Whether `capture` does anything.
    """

    name: str
    torch_device: torch.device
    can_capture: bool

    def free_bytes(self) -> int:
        """Memory that can still be taken."""
        ...

    def total_bytes(self) -> int:
        """All memory of the device; 0 where nobody asks."""
        ...

    def staging(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that is copied from and to without waiting: `[size]`."""
        ...

    def fence(self) -> Fence:
        """A fence, passed already."""
        ...

    def capture(self, compute: Callable[[], None]) -> Graph:
        """Capture what a function launches. It must have run before, must not wait for the device, and is not computed by this."""
        ...

    def together(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Launch two pieces of work that do not depend on each other: side by side in a graph, else one after the other.

        Neither may allocate memory that outlives it.
        """
        ...

    def peak_bytes(self, compute: Callable[[], None]) -> int:
        """Memory that a function takes at its highest, over what is held before it."""
        ...

    def release(self) -> None:
        """Give back memory that is kept for reuse."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says that the device has no memory left."""
        ...


class _PassedFence:
    """A fence on a device that is never ahead of the host."""

    def record(self) -> None:
        """See `Fence.record`."""

    def synchronize(self) -> None:
        """See `Fence.synchronize`."""


class HostDevice:
    """The CPU. See `Device`."""

    name = "cpu"
    torch_device = torch.device("cpu")
    can_capture = False

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        return machine.available_memory_bytes()

    def total_bytes(self) -> int:
        """See `Device.total_bytes`."""
        return 0

    def staging(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Device.staging`."""
        return torch.empty(size, dtype=dtype)

    def fence(self) -> Fence:
        """See `Device.fence`."""
        return _PassedFence()

    def capture(self, compute: Callable[[], None]) -> Graph:
        """See `Device.capture`: there is nothing to capture with."""
        raise RuntimeError("a CPU captures no graphs")

    def together(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """See `Device.together`."""
        first()
        second()

    def peak_bytes(self, compute: Callable[[], None]) -> int:
        """See `Device.peak_bytes`; computed, not measured."""
        compute()
        return 0

    def release(self) -> None:
        """See `Device.release`."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `Device.is_out_of_memory`."""
        return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


class GpuDevice:
    """One GPU. See `Device`.

    Args:
        name: `cuda` or `rocm`.
        torch_device: The GPU.
        cuda: `torch.cuda`.
        pin: Gives a copy of a host tensor in page-locked memory.
    """

    can_capture = True

    def __init__(
        self,
        name: str,
        torch_device: torch.device,
        *,
        cuda: Any = torch.cuda,
        pin: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.pin_memory,
    ) -> None:
        self.name = name
        self.torch_device = torch_device
        self._cuda = cuda
        self._pin = pin
        self._side = cuda.Stream(device=torch_device)
        # Graphs are replayed one at a time, so all of them may use the same memory.
        self._pool: Any = None

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        self.release()
        return int(self._cuda.mem_get_info(self.torch_device)[0])

    def total_bytes(self) -> int:
        """See `Device.total_bytes`."""
        return int(self._cuda.mem_get_info(self.torch_device)[1])

    def staging(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Device.staging`."""
        return self._pin(torch.empty(size, dtype=dtype, device="cpu"))

    def fence(self) -> Fence:
        """See `Device.fence`."""
        fence: Fence = self._cuda.Event()
        return fence

    def capture(self, compute: Callable[[], None]) -> Graph:
        """See `Device.capture`."""
        graph = self._cuda.CUDAGraph()
        self._cuda.synchronize(self.torch_device)
        # What other threads ask of the device does not concern this capture.
        with self._cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()
        if self._pool is None:
            self._pool = graph.pool()
        captured: Graph = graph
        return captured

    def together(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """See `Device.together`. Launched one by one, waiting for each other would cost more than the work side by side saves."""
        if not self._cuda.is_current_stream_capturing():
            first()
            second()
            return
        main = self._cuda.current_stream(self.torch_device)
        self._side.wait_stream(main)
        with self._cuda.stream(self._side):
            second()
        first()
        main.wait_stream(self._side)

    def peak_bytes(self, compute: Callable[[], None]) -> int:
        """See `Device.peak_bytes`."""
        self.release()
        self._cuda.reset_peak_memory_stats(self.torch_device)
        before = int(self._cuda.memory_allocated(self.torch_device))
        compute()
        self._cuda.synchronize(self.torch_device)
        return int(self._cuda.max_memory_allocated(self.torch_device)) - before

    def release(self) -> None:
        """See `Device.release`."""
        self._cuda.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `Device.is_out_of_memory`; the libraries that torch calls say it in words of their own."""
        text = str(error).lower()
        return isinstance(error, self._cuda.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and ("out of memory" in text or "alloc_failed" in text)
        )


def launch_problem() -> tuple[str, str] | None:
    """What Triton lacks, which compiles launches of kernels as a C extension of Python, and what to do; None where it has all."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels", "install gcc, or name one in CC"
    # Triton's own choice: Debian's posix_local names a folder below /usr/local, where no headers are.
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    # Compilers look into these by themselves.
    others = [folder for name in ("CPATH", "C_INCLUDE_PATH") for folder in os.environ.get(name, "").split(os.pathsep) if folder]
    if any(Path(folder, "Python.h").is_file() for folder in (headers, *others)):
        return None
    return f"Triton needs Python's headers to launch kernels, and {headers} has no Python.h", "install python3-dev"


def find_device(setting: str, *, cuda: Any = torch.cuda, hip: str | None = torch.version.hip) -> tuple[Device, str]:
    """Choose the device.

    Args:
        setting: `auto`, `cpu`, `cuda` or `rocm`.
        cuda: `torch.cuda`.
        hip: Version of ROCm that torch is built for; None for CUDA and for none.

    Returns:
        The device, and why it was taken, for the log.

    Raises:
        ConfigError: The device that was asked for is not there, or is of an architecture that the kernels are not checked for.
    """
    if setting == "cpu":
        return HostDevice(), "set"
    found = "rocm" if hip is not None else "cuda"
    missing = None
    if setting not in ("auto", found):
        missing = f"torch {torch.__version__} is built for {found}: set it to {found} or {INSTALL_HINT}"
    elif not cuda.is_available():
        is_built = hip is not None or getattr(cuda, "_is_compiled", lambda: True)()
        without = f"torch {torch.__version__} knows no GPU: {INSTALL_HINT}"
        missing = "torch finds no GPU: is its driver there?" if is_built else without
    else:
        device = torch.device("cuda", int(cuda.current_device()))
        try:
            architecture = architecture_of(device)
        except UnsupportedArchitectureError as error:
            missing = str(error)
        else:
            missing = ": ".join(launch_problem() or ()) or None
        if missing is None:
            return GpuDevice(found, device, cuda=cuda), f"{cuda.get_device_name(device)}, {architecture.name}"
    if setting == "auto":
        return HostDevice(), f"no GPU to use: {missing}"
    raise ConfigError(f"worker.device is {setting}, but {missing}", param="worker.device")
