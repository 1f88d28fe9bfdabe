"""What the settings say of the device, and what computes on it: one table of what goes together.

| device | `worker.attention_backend` | the network is computed by |
|---|---|---|
| cpu | auto | native kernels where they are built and know the model, else torch (`worker.backend`) |
| cpu | native, torch | the one that is named |
| cpu | triton | torch, and Triton kernels under their interpreter: for tests |
| cuda, rocm | auto, triton | torch's products of plain matrices, and Triton kernels |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from headrace.errors import ConfigError

TRITON: Final = "triton"


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """What the settings say of the device; see `config.py`.

    Attributes:
        kv_cache_bytes: Memory for KV pages; None for what is free but for the reserve.
        reserve_bytes: Memory of a GPU that KV pages leave; None for what `gpu_memory.py` finds.
    """

    device: str = "cpu"
    attention_backend: str = "auto"
    graph_batch_sizes: tuple[int, ...] = ()
    kv_cache_bytes: int | None = None
    reserve_bytes: int | None = None


def choose_backend(*, device: str, backend: str, attention_backend: str) -> str:
    """Say what computes the network.

    Args:
        device: `cpu`, `cuda` or `rocm`.
        backend: `worker.backend`.
        attention_backend: `worker.attention_backend`.

    Returns:
        `triton`, or what `worker.backend` may be.

    Raises:
        ConfigError: The three do not go together.
    """
    if device != "cpu":
        if backend == "native":
            raise _conflict("backend", backend, f"worker.device is {device}, and the native kernels run on the CPU: set it to auto")
        if attention_backend not in ("auto", TRITON):
            raise _conflict("attention_backend", attention_backend, f"on worker.device {device} it can only be auto or triton")
        return TRITON
    if attention_backend == "auto":
        return backend
    needed = "native" if attention_backend == "native" else "torch"
    if backend not in ("auto", needed):
        raise _conflict("attention_backend", attention_backend, f"worker.backend is {backend}: set that to auto")
    return attention_backend


def _conflict(field: str, value: str, why: str) -> ConfigError:
    return ConfigError(f"worker.{field} is {value}, but {why}", param=f"worker.{field}")
