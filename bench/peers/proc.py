"""What a tree of processes uses, from /proc: memory and processor time. Linux; reads, and resets one counter of the kernel's.

Peak memory is had without sampling, which would disturb what is measured. The kernel keeps each process's highest resident size and
lets it be reset; so before a measurement it is reset, and after it read. PSS, which counts a page shared by n processes as 1/n in
each, has no such mark: the peak of a tree is its PSS afterwards plus what its processes had resident above that at their own peaks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from headrace.supervision.process_table import ProcessEntry, descendants, read_table

_RESET_PEAK = b"5"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """A process's or a tree's memory in bytes."""

    pss: int = 0
    rss: int = 0
    peak_rss: int = 0
    """The highest resident size of each process since the last reset, added up: they need not have had it at once."""
    num_processes: int = 0

    @property
    def peak_pss(self) -> int:
        """See the module's docstring; not below the true peak but for processes that have ended meanwhile."""
        return self.pss + max(0, self.peak_rss - self.rss)

    def plus(self, other: Memory) -> Memory:
        """Both together."""
        return Memory(
            self.pss + other.pss, self.rss + other.rss, self.peak_rss + other.peak_rss, self.num_processes + other.num_processes
        )

    def as_json(self) -> dict[str, float]:
        """In MiB, for the result file."""
        sizes = {"pss": self.pss, "peak_pss": self.peak_pss, "rss": self.rss, "peak_rss": self.peak_rss}
        return {f"{name}_mib": round(size / _MIB, 1) for name, size in sizes.items()} | {"num_processes": self.num_processes}


def tree(root_pid: int) -> list[ProcessEntry]:
    """The live processes of a tree, its root among them."""
    table = read_table()
    pids = {root_pid, *descendants(table, {root_pid})}
    return [table[pid] for pid in sorted(pids) if pid in table and table[pid].is_alive]


def reset_peaks(root_pid: int) -> None:
    """Let the kernel's highest resident sizes of a tree begin anew at what they are now."""
    for entry in tree(root_pid):
        try:
            with open(f"/proc/{entry.pid}/clear_refs", "wb") as file:
                file.write(_RESET_PEAK)
        except (FileNotFoundError, ProcessLookupError):
            continue


def read_memory(root_pid: int) -> Memory:
    """The memory of a tree now, and its peak since the last reset."""
    total = Memory()
    for entry in tree(root_pid):
        try:
            with open(f"/proc/{entry.pid}/smaps_rollup") as rollup, open(f"/proc/{entry.pid}/status") as status:
                total = total.plus(parse_memory(rollup.read(), status.read()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def parse_memory(rollup: str, status: str) -> Memory:
    """One process's memory from the texts of its `smaps_rollup` and `status`."""
    mapped, counted = _kib_fields(rollup), _kib_fields(status)
    return Memory(
        pss=mapped.get("Pss", 0) << 10, rss=mapped.get("Rss", 0) << 10, peak_rss=counted.get("VmHWM", 0) << 10, num_processes=1
    )


def _kib_fields(text: str) -> dict[str, int]:
    fields = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            fields[name] = int(rest.split()[0])
    return fields


def tree_cpu_s(root_pid: int) -> float:
    """Processor time that the live processes of a tree have used so far, seconds; a clock tick (10 ms) exact each."""
    total = 0
    for entry in tree(root_pid):
        try:
            with open(f"/proc/{entry.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


def machine_cpu_s() -> float:
    """Processor time that the whole machine has used so far, all cores, waiting and idle times left out, seconds."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def available_bytes() -> int:
    """Memory that a new process could get without swapping."""
    with open("/proc/meminfo") as file:
        return _kib_fields(file.read())["MemAvailable"] << 10
