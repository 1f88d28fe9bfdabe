"""Reads what a compiled kernel takes of its processor out of the artefact itself, and judges it.

NVIDIA: `cuobjdump -res-usage`, which comes in Triton's wheel, on the cubin. Triton's kernels keep no arrays of their own in local
memory, so a stack frame is spilled registers. AMD: the metadata notes at the end of the assembly. Shared memory is what a launch
asks for, in Triton's metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kernels.aot.registry import RegisteredCase

_TOOL_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: Vector registers a thread; on AMD those of accumulation among them.
        spilled_bytes: Bytes a thread that did not fit into registers and live in memory instead.
        shared_bytes: Shared memory of a program.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int


def read(compiled: Any) -> Resources:
    """Read the resources of a `triton.compiler.CompiledKernel`."""
    if "cubin" in compiled.asm:
        return _read_cubin(compiled.asm["cubin"], shared_bytes=compiled.metadata.shared)
    return _read_amdgcn(compiled.asm["amdgcn"], shared_bytes=compiled.metadata.shared)


def problems(registered: RegisteredCase, resources: Resources) -> list[str]:
    """Say what is wrong with a case's resources; empty when nothing is."""
    found = []
    architecture = registered.architecture
    if registered.case.is_hot and resources.spilled_bytes:
        found.append(f"{registered.key}: {resources.spilled_bytes} bytes a thread spilled; a hot kernel may spill none")
    if resources.shared_bytes > architecture.shared_bytes_max:
        found.append(
            f"{registered.key}: {resources.shared_bytes} bytes of shared memory, {architecture.name} has "
            f"{architecture.shared_bytes_max}: fewer stages or smaller blocks"
        )
    if resources.registers > architecture.registers_max:
        found.append(f"{registered.key}: {resources.registers} registers, {architecture.name} has {architecture.registers_max}")
    return found


def _read_cubin(cubin: bytes, *, shared_bytes: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TOOL_TIMEOUT_S)
    usage = re.search(r"REG:(\d+)\s+STACK:(\d+)", done.stdout)
    if usage is None:
        raise ValueError(f"cuobjdump -res-usage says nothing of registers: {done.stdout!r}")
    registers, stack_bytes = map(int, usage.groups())
    return Resources(registers, stack_bytes, shared_bytes)


def _read_amdgcn(assembly: str, *, shared_bytes: int) -> Resources:
    def note(name: str) -> int:
        found = re.search(rf"^\s*-?\s*\.{name}:\s+(\d+)\s*$", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly's metadata has no .{name}")
        return int(found.group(1))

    spilled = max(note("private_segment_fixed_size"), 4 * note("vgpr_spill_count"))
    # On CDNA `.vgpr_count` is the whole of the unified file, `.agpr_count` the part of it used for accumulation.
    return Resources(note("vgpr_count"), spilled, shared_bytes)
