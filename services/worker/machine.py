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
_MEMORY_MAX = "sys/fs/cgroup/memory.max"
_MEMORY_CURRENT = "sys/fs/cgroup/memory.current"


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
    """Memory that can still be taken, within the container's limit."""
    available = 0
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            available = int(value.split()[0]) * 1024
    limit, current = _text(root / _MEMORY_MAX), _text(root / _MEMORY_CURRENT)
    if limit.isdigit() and current.isdigit():
        return min(available, max(0, int(limit) - int(current)))
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
