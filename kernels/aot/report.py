"""`kernels/RESOURCES.md`: what every compiled kernel takes, and every op's roofline; written by `make kernels-report`.

The page is read back by tests: fingerprints say whether a kernel or a case has changed since, and some of the cases are compiled
and compared. It cannot go stale unseen.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
"Made of" is a digest of the kernel's source and the case, by which a test sees that the row is of today's kernel.

| kernel | case | {names} | made of |
|---|---|{rules}|---|
"""

_ROOFLINE: Final = """
# Roofline on paper

Bytes that must move and operations that must be done, and the least time for them from published rates (`kernels/aot/roofline.py`).
M: memory bounds it; C: computing does.

| op | call | MB | Gop | unit | {names} |
|---|---|--:|--:|---|{rules}|
"""


@dataclass(frozen=True, slots=True)
class Page:
    """The page as read back: Triton's version, fingerprints by row, resources by key."""

    triton: str
    fingerprints: Mapping[str, str]
    resources: Mapping[str, Resources]


def write(outcomes: Mapping[str, Outcome], fingerprints: Mapping[str, str], workloads: Iterable[tuple[str, Workload]]) -> None:
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
        text += f"| {case} | {' | '.join(cells.get(name, '') for name in ARCHITECTURES)} | {fingerprints[case]} |\n"
    names = " | ".join(f"{each.name} µs" for each in ACCELERATORS)
    text += _ROOFLINE.format(names=names, rules="|".join("--:" for _ in ACCELERATORS))
    text += "".join(_roofline_row(op, workload) for op, workload in workloads)
    RESOURCES_PATH.write_text(text)


def read_page() -> Page:
    """Read the page back."""
    text = RESOURCES_PATH.read_text()
    version = re.search(r"with Triton (\S+);", text)
    fingerprints: dict[str, str] = {}
    resources: dict[str, Resources] = {}
    for line in text.splitlines():
        kernel, *rest = (part.strip() for part in line.strip("|").split("|"))
        if not kernel.endswith("_kernel"):
            continue
        label, *cells, fingerprint = rest
        fingerprints[f"{kernel} | {label}"] = fingerprint
        for name, cell in zip(ARCHITECTURES, cells, strict=True):
            if cell:
                resources[f"{kernel} | {label} | {name}"] = Resources(*map(int, cell.split("/")))
    return Page(version.group(1) if version else "", fingerprints, resources)


def _cell(resources: Resources) -> str:
    return f"{resources.registers}/{resources.spilled_bytes}/{resources.shared_bytes}"


def _roofline_row(op: str, workload: Workload) -> str:
    times = " | ".join(
        f"{attainable_s(workload, each) * 1e6:.2f} {'M' if is_memory_bound(workload, each) else 'C'}" for each in ACCELERATORS
    )
    megabytes, giga = workload.num_bytes / 1e6, workload.num_operations / 1e9
    return f"| {op} | {workload.label} | {megabytes:.3f} | {giga:.4f} | {workload.unit} | {times} |\n"
