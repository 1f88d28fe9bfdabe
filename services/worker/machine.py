"""What the machine offers: CPU flags, cores that may be used, free memory; container limits included. Read from /proc and /sys."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Parameters of mallopt, and the largest value that glibc takes for the first.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BLOCK_BYTES = 32 << 20
_LOADING_BLOCK_BYTES = 1 << 20

_CPU_MAX = "sys/fs/cgroup/cpu.max"
# Of both versions of cgroups: folder, limit, what is used, and in memory.stat the pages of files that are part of it.
_MEMORY_LIMITS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Features of the first CPU, as /proc/cpuinfo names them (`flags` on x86, `Features` on ARM); empty where it cannot be read."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def num_usable_cores(root: Path = Path("/")) -> int:
    """Physical cores among the CPUs that this process may run on, no more than its container's share; at least 1.

    Two threads of one core share its multipliers, so a second one gains nothing and costs barriers.
    """
    cpus = os.sched_getaffinity(0)
    cores = {_core_of(cpu, root) for cpu in cpus}
    quota, _, period = _text(root / _CPU_MAX).partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        return max(1, min(len(cores), int(quota) // int(period)))
    return max(1, len(cores))


@contextmanager
def short_lived_blocks() -> Iterator[None]:
    """While much memory is taken for a short time: have large blocks given back at once when they are freed.

    glibc keeps freed blocks for later, between those that stay; after loading a model that is a tenth of it. With another C library
    nothing changes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LOADING_BLOCK_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LOADING_BLOCK_BYTES)
    try:
        yield
    finally:
        # Where glibc itself would arrive after the first large blocks: what a step frees, the next step takes again.
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BLOCK_BYTES)
        libc.malloc_trim(0)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be taken, within the container's limit.

    Pages that the kernel keeps of files, weights that were read among them, count as used there and are given up when memory is
    asked for.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files"; cgroup-v1/memory.rst, "stat file".
    """
    available = 0
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            available = int(value.split()[0]) * 1024
    for folder, limit_name, used_name, file_keys in _MEMORY_LIMITS:
        limit, used = _text(root / folder / limit_name), _text(root / folder / used_name)
        if limit.isdigit() and used.isdigit():
            counts = dict(line.split(maxsplit=1) for line in _lines(root / folder / "memory.stat") if " " in line)
            num_file_bytes = sum(int(counts.get(key, 0)) for key in file_keys)
            available = min(available, max(0, int(limit) - int(used) + num_file_bytes))
    return available


def _core_of(cpu: int, root: Path) -> tuple[str, str]:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    package, core = _text(topology / "physical_package_id"), _text(topology / "core_id")
    return (package, core) if core else ("", f"cpu{cpu}")


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        # Not every kernel and container shows every file; without it there is no limit to obey.
        return ""
