"""Memory and processor time of a tree of processes, from texts of /proc and from a real child."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.peers import proc
from bench.peers.proc import Memory
from tests.patience import WAIT_S

MIB = 1 << 20
ROLLUP = "00400000-7ffd [rollup]\nRss:        2048 kB\nPss:        1024 kB\nPss_Dirty:   100 kB\n"
STATUS = "Name:\tpython\nVmPeak:\t  9000 kB\nVmHWM:\t  3072 kB\nVmRSS:\t  2040 kB\nThreads:\t4\n"
# Holds a grandchild, grows by 64 MiB on the first line of input and is small again before it answers; works on the second.
CHILD = """
import subprocess, sys
grandchild = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print("up", flush=True)
sys.stdin.readline()
grown = bytearray(64 << 20)
del grown
print("grown", flush=True)
sys.stdin.readline()
sum(range(3_000_000))
print("worked", flush=True)
sys.stdin.read()
grandchild.stdin.close()
grandchild.wait()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert read_line(process) == "up"
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=WAIT_S)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return read_line(process)


def test_memory_of_a_process_is_read_from_its_two_files() -> None:
    memory = proc.parse_memory(ROLLUP, STATUS)
    assert memory == Memory(pss=MIB, rss=2 * MIB, peak_rss=3 * MIB, num_processes=1)
    assert memory.peak_pss == 2 * MIB


def test_memories_add_up_and_a_peak_below_the_present_adds_nothing() -> None:
    both = Memory(1, 2, 5, 1).plus(Memory(10, 20, 20, 2))
    assert both == Memory(11, 22, 25, 3)
    assert Memory(pss=4, rss=8, peak_rss=7).peak_pss == 4
    assert Memory(pss=MIB, rss=MIB, peak_rss=2 * MIB, num_processes=1).as_json() == {
        "pss_mib": 1.0, "peak_pss_mib": 2.0, "rss_mib": 1.0, "peak_rss_mib": 2.0, "num_processes": 1,
    }  # fmt: skip


def test_a_tree_holds_the_root_and_all_below_it(child: subprocess.Popen[str]) -> None:
    found = {entry.pid for entry in proc.tree(child.pid)}
    assert child.pid in found and len(found) == 2
    assert os.getpid() not in found
    assert proc.read_memory(child.pid).num_processes == 2


def test_a_peak_since_the_reset_is_seen_after_it_is_gone(child: subprocess.Popen[str]) -> None:
    proc.reset_peaks(child.pid)
    before = proc.read_memory(child.pid)
    assert tell(child) == "grown"
    after = proc.read_memory(child.pid)
    assert after.pss - before.pss < 32 * MIB
    assert after.peak_pss - before.peak_pss > 48 * MIB
    proc.reset_peaks(child.pid)
    assert proc.read_memory(child.pid).peak_pss - before.peak_pss < 32 * MIB


def test_processor_time_grows_with_work(child: subprocess.Popen[str]) -> None:
    tell(child)
    before_s, machine_before_s = proc.tree_cpu_s(child.pid), proc.machine_cpu_s()
    assert tell(child) == "worked"
    assert proc.tree_cpu_s(child.pid) > before_s
    assert proc.machine_cpu_s() > machine_before_s


def test_a_process_that_is_gone_counts_for_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=WAIT_S)
    proc.reset_peaks(gone.pid)
    assert proc.read_memory(gone.pid) == Memory()
    assert proc.tree_cpu_s(gone.pid) == 0.0


def test_some_memory_is_available() -> None:
    assert proc.available_bytes() > MIB
