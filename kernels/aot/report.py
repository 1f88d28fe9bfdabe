"""`kernels/RESOURCES.md`: what every compiled kernel takes, and every op's roofline; written by `make kernels-report`.

The cells are read back by a test, which compiles some of the cases and compares: the page cannot go stale unseen.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Final

from kernels.aot.cases import Workload
from kernels.aot.compiling import Outcome
from kernels.aot.registry import KERNELS
from kernels.aot.resources import Resources
from kernels.aot.roofline import ACCELERATORS, attainable_s, is_memory_bound
from kernels.architecture import ARCHITECTURES

RESOURCES_PATH: Final = KERNELS / "RESOURCES.md"

_HEAD: Final = """\
# What the kernels take, read from the compiled artefacts

Written by `make kernels-report`, with Triton {triton}; not by hand. A cell is registers a thread / bytes a thread spilled to memory
/ bytes of shared memory a program. Registers on gfx are those of the unified vector file. Limits: `kernels/architecture.py`.

| kernel | case | {names} |
|---|---|{rules}|
"""

_ROOFLINE: Final = """
# Roofline on paper

Bytes that must move and operations that must be done, and the least time for them from published rates (`kernels/aot/roofline.py`).
M: memory bounds it; C: computing does.

| op | call | MB | Gop | unit | {names} |
|---|---|--:|--:|---|{rules}|
"""


def write(outcomes: Mapping[str, Outcome], workloads: Iterable[tuple[str, Workload]]) -> None:
    """Write the page.

    Raises:
        ValueError: A case has no resources: it did not compile.
    """
    rows: dict[str, dict[str, str]] = {}
    for key, outcome in outcomes.items():
        if outcome.resources is None:
            raise ValueError(outcome.problems[0])
        case, architecture = key.rsplit(" | ", 1)
        rows.setdefault(case, {})[architecture] = _cell(outcome.resources)
    names = " | ".join(ARCHITECTURES)
    text = _HEAD.format(triton=importlib.metadata.version("triton"), names=names, rules="|".join("--:" for _ in ARCHITECTURES))
    for case, cells in rows.items():
        text += f"| {case} | {' | '.join(cells.get(name, '') for name in ARCHITECTURES)} |\n"
    names = " | ".join(f"{each.name} µs" for each in ACCELERATORS)
    text += _ROOFLINE.format(names=names, rules="|".join("--:" for _ in ACCELERATORS))
    text += "".join(_roofline_row(op, workload) for op, workload in workloads)
    RESOURCES_PATH.write_text(text)


def read_page() -> dict[str, Resources]:
    """Read the page back: resources by key."""
    found = {}
    for line in RESOURCES_PATH.read_text().splitlines():
        kernel, *rest = (part.strip() for part in line.strip("|").split("|"))
        if not kernel.endswith("_kernel"):
            continue
        for name, cell in zip(ARCHITECTURES, rest[1:], strict=True):
            if cell:
                found[f"{kernel} | {rest[0]} | {name}"] = Resources(*map(int, cell.split("/")))
    return found


def _cell(resources: Resources) -> str:
    return f"{resources.registers}/{resources.spilled_bytes}/{resources.shared_bytes}"


def _roofline_row(op: str, workload: Workload) -> str:
    times = " | ".join(
        f"{attainable_s(workload, each) * 1e6:.2f} {'M' if is_memory_bound(workload, each) else 'C'}" for each in ACCELERATORS
    )
    megabytes, giga = workload.num_bytes / 1e6, workload.num_operations / 1e9
    return f"| {op} | {workload.label} | {megabytes:.3f} | {giga:.4f} | {workload.unit} | {times} |\n"
