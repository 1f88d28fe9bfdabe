"""A supervisor within a supervisor: a launcher and its ranks live and die as one, whoever is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

LAUNCHER = str(Path(__file__).with_name("launcher_program.py"))


@pytest.fixture
def launched(tree):
    tree.add("worker", argv=[sys.executable, LAUNCHER, tree.tag, "2"])
    tree.start()
    tree.wait_ready()
    # Two supervisors with a guard each; of each rank itself and two shells that each run a sleep.
    tree.wait_until(lambda: len(tree.pids()) == 4 + 2 * 5, "all processes")
    return tree


def rank_pids(tree) -> dict[str, int]:
    ranks = {pid: line for pid, line in tree.pids().items() if "child_program.py" in line}
    return {name: pid for pid, line in ranks.items() for name in ("rank0", "rank1") if name in line}


def test_a_stop_reaches_the_ranks_and_is_clean(launched):
    launched.signal(signal.SIGTERM)
    assert launched.wait() == 0
    assert launched.pids() == {}


@pytest.mark.parametrize("victim", ["launcher", "rank1"])
def test_kill_of_a_launcher_or_a_rank_brings_a_whole_new_group(launched, victim):
    before = launched.pids()
    kept = {launched.pid, launched.guard_pid()} - {pid for pid, line in before.items() if "launcher_program" in line}
    os.kill(launched.child_pid("worker") if victim == "launcher" else rank_pids(launched)["rank1"], signal.SIGKILL)
    launched.wait_ready(times=2)
    launched.wait_until(lambda: len(launched.pids()) == len(before), "as many processes as before")
    survivors = set(before) & set(launched.pids())
    assert launched.pid in survivors
    assert survivors <= kept | guards(before), f"of the old group only guards may be left: {before}"
    launched.signal(signal.SIGTERM)
    assert launched.wait() == 0
    assert launched.pids() == {}


def test_kill_of_the_outer_supervisor_leaves_nothing_of_the_ranks(launched):
    launched.signal(signal.SIGKILL)
    launched.wait()
    launched.wait_nothing_left(3)


def guards(pids: dict[int, str]) -> set[int]:
    return {pid for pid, line in pids.items() if "guard import main" in line}
