"""What an op declares about itself: the kernels and configurations to compile, and the calls to put on the roofline.

Each `kernels/<op>/compile_cases.py` has two functions:

    def cases(architecture: Architecture) -> Iterator[CompileCase]
    def workloads() -> Iterator[Workload]

Cases must take their constants and configuration from the same functions that `launch.py` takes them from, so that what is
compiled is what will be launched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from kernels.launching import LaunchConfig

TYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
"""Triton's names of types; `*` before one makes it a pointer."""

Unit = Literal["fp32", "fp16", "fp8", "int8"]
"""Which arithmetic unit a workload keeps busy: vector float32, or a matrix unit (fp16 stands for bfloat16 too)."""


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One kernel with one set of types and constants.

    Attributes:
        label: What tells it from the kernel's other cases, for people: `bf16, head 128, page 16`. No `|`.
        kernel: The function under `@triton.jit`; its name ends in `_kernel`.
        types: Triton type of each argument that is no constant: `*bf16`, `i32`, `fp32`.
        constants: Values of the constant arguments, and of others that a launch would fold in (None, 1).
        config: Warps and stages.
        unaligned: Arguments that need not be divisible by 16, beside those that the kernel's decorator names. A launch specialises
            pointers and integers that are, and for most that is so (addresses from torch's allocator, strides of whole heads);
            counts and lengths belong here.
        is_hot: Runs in every layer of a step: a spilled register is an error.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    config: LaunchConfig
    unaligned: frozenset[str] = field(default_factory=frozenset)
    is_hot: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """One call on paper: what it must move and compute at least.

    Attributes:
        label: Sizes, for people. No `|`.
        num_bytes: Bytes that must be read from and written to memory, each once.
        num_operations: Additions and multiplications, a fused one counted as two.
        unit: Where the operations run.
    """

    label: str
    num_bytes: int
    num_operations: int
    unit: Unit
