"""Finds the ops, and every case of every op on every architecture. An op without cases, or a kernel without a case, is an error."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from kernels.aot.cases import CompileCase, Workload
from kernels.architecture import ARCHITECTURES, Architecture

KERNELS: Final = Path(__file__).resolve().parents[1]
"""The folder `kernels/`."""


@dataclass(frozen=True, slots=True)
class RegisteredCase:
    """A case with where it belongs. `is_quick`: it is in the subset that `make test` compiles."""

    op: str
    architecture: Architecture
    case: CompileCase
    is_quick: bool

    @property
    def kernel_name(self) -> str:
        """The kernel's name."""
        return str(self.case.kernel.__name__)

    @property
    def row(self) -> str:
        """Names the case in the report, over all architectures: `kernel | label`."""
        return f"{self.kernel_name} | {self.case.label}"

    @property
    def key(self) -> str:
        """Names the case in messages: `kernel | label | architecture`."""
        return f"{self.row} | {self.architecture.name}"


def op_names() -> list[str]:
    """The ops, sorted: every folder of `kernels/` that holds a Triton kernel."""
    return sorted(path.parent.name for path in KERNELS.glob("*/kernel.py"))


def kernel_names(op: str) -> set[str]:
    """The kernels that an op defines itself: what is named `…_kernel` in its `kernel.py`."""
    module = importlib.import_module(f"kernels.{op}.kernel")
    return {name for name, value in vars(module).items() if name.endswith("_kernel") and value.fn.__module__ == module.__name__}


def all_cases() -> Iterator[RegisteredCase]:
    """Every case.

    Quick are all cases of hot kernels on sm_90, and the first case of each kernel on each architecture.

    Raises:
        LookupError: A kernel has no case on an architecture, or two cases have one key.
    """
    for op in op_names():
        module = _cases_module(op)
        for architecture in ARCHITECTURES.values():
            seen: set[str] = set()
            keys: set[str] = set()
            for case in module.cases(architecture):
                name = str(case.kernel.__name__)
                is_hot_here = case.is_hot and architecture.name == "sm_90"
                found = RegisteredCase(op, architecture, case, is_quick=is_hot_here or name not in seen)
                if found.key in keys:
                    raise LookupError(f"kernels/{op}/compile_cases.py: two cases are named {found.key!r}")
                seen.add(name)
                keys.add(found.key)
                yield found
            if missing := kernel_names(op) - seen:
                raise LookupError(f"kernels/{op}/compile_cases.py has no case of {min(missing)} on {architecture.name}")


def all_workloads() -> Iterator[tuple[str, Workload]]:
    """Every op's workloads.

    Raises:
        LookupError: An op has none.
    """
    for op in op_names():
        workloads = list(_cases_module(op).workloads())
        if not workloads:
            raise LookupError(f"kernels/{op}/compile_cases.py: workloads() yields none")
        for workload in workloads:
            yield op, workload


def _cases_module(op: str) -> ModuleType:
    return importlib.import_module(f"kernels.{op}.compile_cases")
