"""The least time a call can take, from the vendors' published bandwidth and arithmetic rates: the bar that kernels are measured by.

Rates are dense (no structured sparsity), at boost clock, of the SXM or OAM module:
H100 and H200: NVIDIA's data sheets (3.35 and 4.8 TB/s; 989 TFLOP/s bf16, 1979 fp8 and int8, 67 fp32).
MI300X: AMD's data sheet (5.3 TB/s; 1307 TFLOP/s bf16, 2615 fp8 and int8, 163.4 fp32 vector).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kernels.aot.cases import Unit, Workload


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One product: memory bandwidth in bytes a second, arithmetic rates in operations a second."""

    name: str
    bytes_per_s: float
    operations_per_s: Mapping[Unit, float]


_HOPPER: Final[Mapping[Unit, float]] = {"fp32": 67e12, "fp16": 989e12, "fp8": 1979e12, "int8": 1979e12}

ACCELERATORS: Final = (
    Accelerator("H100", 3.35e12, _HOPPER),
    Accelerator("H200", 4.8e12, _HOPPER),
    Accelerator("MI300X", 5.3e12, {"fp32": 163.4e12, "fp16": 1307e12, "fp8": 2615e12, "int8": 2615e12}),
)


def attainable_s(workload: Workload, accelerator: Accelerator) -> float:
    """Give the time of a call, in seconds, that neither memory nor arithmetic lets anyone beat. Launch costs are not in it."""
    memory_s = workload.num_bytes / accelerator.bytes_per_s
    return max(memory_s, workload.num_operations / accelerator.operations_per_s[workload.unit])


def is_memory_bound(workload: Workload, accelerator: Accelerator) -> bool:
    """Whether memory is what bounds the call."""
    arithmetic_s = workload.num_operations / accelerator.operations_per_s[workload.unit]
    return workload.num_bytes / accelerator.bytes_per_s >= arithmetic_s
