"""Whatever dies, by SIGKILL and at any moment: either it is back, or nothing of the tree is left."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.patience import WAIT_S, promised


def wait_beats(tree, log, count=5):
    """Wait until a process with this `beat_log` has sent `count` more heartbeats."""
    before = log.stat().st_size if log.exists() else 0
    tree.wait_until(lambda: log.exists() and log.stat().st_size >= before + count, f"{count} heartbeats")


def test_kill_of_the_supervisor_leaves_nothing_within_3_s(tree):
    tree.add("router", grandchild=True, daemon=True)
    tree.add("plain", argv=["sh", "-c", f"sleep 1000; : {tree.tag}"])
    tree.specs[-1]["start_after"] = ["router"]
    tree.add("worker", heartbeat=True, grandchild=True)
    tree.start()
    tree.wait_ready("router", "worker")
    tree.wait_until(lambda: any("sleep 1000; :" in cmdline for cmdline in tree.pids().values()), "the process without attach()")
    tree.signal(signal.SIGKILL)
    tree.wait()
    tree.wait_nothing_left(3)
    assert f"supervisor {tree.pid} is gone; its guard killed" in tree.stderr()


@pytest.mark.parametrize("seed", range(4))
def test_kill_of_the_supervisor_at_any_moment_of_its_start_leaves_nothing(make_tree, seed):
    chance = random.Random(seed)
    for _ in range(4):
        tree = make_tree()
        for name in ("router", "tokenizer", "worker"):
            tree.add(name, grandchild=True, daemon=True, start_s=chance.random() * 0.2)
        tree.add("plain", argv=["sh", "-c", f"sleep 1000; : {tree.tag}"])
        tree.start()
        time.sleep(chance.random() * 0.8)
        tree.signal(signal.SIGKILL)
        tree.wait()
        tree.wait_nothing_left(3)


def test_kill_of_the_supervisor_leaves_nothing_of_children_that_are_stopped_or_ignore_signals(tree):
    tree.add("router", ignore_sigterm=True, grandchild=True)
    tree.add("worker")
    tree.start()
    tree.wait_ready()
    os.kill(tree.child_pid("worker"), signal.SIGSTOP)
    tree.signal(signal.SIGKILL)
    tree.wait()
    tree.wait_nothing_left(3)


def test_without_its_guard_the_children_still_die_with_the_supervisor(tree):
    """Goal: the parent death signal and the lifeline stand on their own. Method: SIGKILL guard and supervisor together."""
    tree.add("router")
    tree.add("worker", heartbeat=True)
    tree.start()
    tree.wait_ready()
    guard_pid = tree.guard_pid()
    os.kill(guard_pid, signal.SIGSTOP)
    tree.signal(signal.SIGKILL)
    os.kill(guard_pid, signal.SIGKILL)
    tree.wait()
    tree.wait_until(lambda: not tree.pids(), "no process of the tree", timeout_s=promised(3))


def test_a_killed_guard_is_replaced_and_the_new_one_does_its_work(tree):
    tree.add("router", grandchild=True, daemon=True)
    tree.start()
    tree.wait_ready()
    first = tree.guard_pid()
    os.kill(first, signal.SIGKILL)
    # From this moment on, though it may not yet have looked round.
    tree.wait_until(lambda: any("guard import main" in line and pid != first for pid, line in tree.pids().items()), "a new guard")
    tree.signal(signal.SIGKILL)
    tree.wait()
    tree.wait_nothing_left(3)


def test_each_killed_process_is_back_and_its_descendants_are_gone(tree):
    for name in ("router", "scheduler", "worker"):
        tree.add(name, grandchild=True, daemon=True)
    tree.start()
    tree.wait_ready()
    # The supervisor, its guard; of each process itself and two shells that each run a sleep.
    num_processes = 2 + 3 * 5
    tree.wait_until(lambda: len(tree.pids()) == num_processes, "all processes")
    for name in ("router", "scheduler", "worker"):
        before = set(tree.pids())
        victim = tree.child_pid(name)
        os.kill(victim, signal.SIGKILL)
        tree.wait_ready(name, times=2)
        assert tree.child_pid(name) != victim
        tree.wait_until(lambda: len(tree.pids()) == num_processes, "as many processes as before")
        assert len(before - set(tree.pids())) >= 3, "the process, its grandchild and its daemon are gone"
    assert "killed by SIGKILL" in [event["reason"] for event in tree.events("process.exited")]
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    assert tree.pids() == {}


def test_a_killed_grandchild_touches_nothing_else(tree):
    tree.add("router", daemon=True)
    tree.start()
    tree.wait_ready()

    def daemons():
        return [pid for pid, line in tree.pids().items() if line.startswith("sh -c while")]

    tree.wait_until(daemons, "the daemon, past its execs")
    (daemon,) = daemons()
    os.kill(daemon, signal.SIGKILL)
    tree.wait_until(lambda: daemon not in tree.pids(), "daemon gone")
    tree.wait_until(lambda: not os.path.exists(f"/proc/{daemon}"), "no zombie of it either")
    assert tree.states("router") == ["starting", "started", "ready"]
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_a_clean_stop_kills_daemons_even_without_our_mark(tree):
    tree.add("router", daemon=True, daemon_without_env=True)
    tree.start()
    tree.wait_ready()
    tree.wait_until(lambda: sum(line.startswith("sh -c while") for line in tree.pids().values()) == 2, "both daemons")
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    assert tree.pids() == {}
    left = str(tree.events("process.left_behind") + tree.events("supervisor.left_behind"))
    assert left.count("is_killed") >= 2


def test_a_crash_loop_stops_the_tree_with_its_own_status(tree):
    tree.limits |= {"crash_loop_restarts": 2, "backoff_initial_s": 0.05}
    tree.add("router", live_s=0.1, exit=9, stderr="out of luck\n")
    tree.add("steady", grandchild=True)
    tree.start()
    assert tree.wait() == 3
    assert tree.states("router").count("starting") == 3
    assert [event["delay_s"] for event in tree.events("process.restarting")] == [0.05, 0.1]
    assert "crash loop: more than 2 restarts within 120 s; last: exit status 9" in tree.stderr().splitlines()[-1]
    assert tree.pids() == {}


def test_a_group_lives_and_dies_as_one(tree):
    tree.add("rank0", spec={"restart": "never"}, grandchild=True)
    tree.add("rank1", spec={"restart": "never"}, daemon=True)
    tree.start()
    tree.wait_ready()
    os.kill(tree.child_pid("rank1"), signal.SIGKILL)
    assert tree.wait() == 5
    assert tree.stderr().splitlines()[-1].startswith("headrace: rank1: killed by SIGKILL")
    assert tree.pids() == {}


def test_a_group_member_that_was_told_to_drain_by_others_ends_the_group_with_status_0(tree):
    tree.add("rank0", spec={"restart": "never"})
    tree.add("rank1", spec={"restart": "never"})
    tree.start()
    tree.wait_ready()
    os.kill(tree.child_pid("rank0"), signal.SIGTERM)
    assert tree.wait() == 0


def test_a_silent_process_is_named_dumped_and_restarted(tree):
    tree.stop_clock()
    tree.add("worker", spec={"stall_timeout_s": 1.0}, heartbeat=True, grandchild=True)
    tree.add("steady", spec={"stall_timeout_s": 1.0})
    tree.options["dump_wait_s"] = 4.0
    tree.start()
    tree.wait_ready()
    victim = tree.child_pid("worker")
    os.kill(victim, signal.SIGSTOP)
    # A heartbeat that was on its way counts from when it is read: the move after that one tells.
    while not tree.events("process.stalled"):
        tree.move_clock(1.5)
        time.sleep(0.1)
    tree.wait_ready("worker", times=2)
    stalled = tree.events("process.stalled")
    assert [(event["process"], event["process_pid"]) for event in stalled] == [("worker", victim)]
    assert "no heartbeat for" in stalled[0]["reason"]
    assert "process is stopped by a signal" in stalled[0]["reason"]
    assert "child_program.py" in tree.stderr(), "the stack dump"
    assert victim not in tree.pids()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_a_busy_process_without_progress_is_restarted_though_it_sends_heartbeats(tree, tmp_path):
    # Of each the next heartbeat is the next look, so that the idle one's silence is never longer than its limit.
    tree.stop_clock()
    tree.add("worker", spec={"stall_timeout_s": WAIT_S}, heartbeat=True, busy=True, stuck=True)
    tree.add("idle", spec={"stall_timeout_s": WAIT_S}, heartbeat=True, stuck=True, beat_log=str(tmp_path / "beats"))
    tree.start()
    tree.wait_ready()
    while not tree.events("process.stalled"):
        tree.move_clock(2 * WAIT_S)
        wait_beats(tree, tmp_path / "beats")
    tree.wait_ready("worker", times=2)
    assert "busy without progress for" in tree.events("process.stalled")[0]["reason"]
    assert {event["process"] for event in tree.events("process.stalled")} == {"worker"}
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_a_supervisor_that_was_itself_stopped_does_not_blame_its_children(tree, tmp_path):
    tree.stop_clock()
    tree.add("worker", spec={"stall_timeout_s": 1.0}, heartbeat=True, beat_log=str(tmp_path / "beats"))
    tree.start()
    tree.wait_ready()
    tree.signal(signal.SIGSTOP)
    tree.move_clock(2.5)
    # What is sent meanwhile waits in the socket.
    wait_beats(tree, tmp_path / "beats")
    tree.signal(signal.SIGCONT)
    wait_beats(tree, tmp_path / "beats")
    assert tree.events("process.stalled") == []
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_a_flood_of_stderr_stalls_nobody_and_costs_no_memory(tree):
    """Goal: 100 MB of stderr pass though nobody reads ours. Method: our stderr is a pipe that is never read."""
    reading, writing = os.pipe()
    tree.add("worker", flood_bytes=100_000_000)
    tree.start(stderr=writing)
    os.close(writing)
    try:
        tree.wait_ready()
        status = dict(line.split(":", 1) for line in Path(f"/proc/{tree.pid}/status").read_text().splitlines())
        assert int(status["VmHWM"].split()[0]) < 100_000, "kB; the supervisor's peak"
        tree.signal(signal.SIGTERM)
        assert tree.wait() == 0
    finally:
        os.close(reading)


def test_a_stale_run_directory_of_a_dead_supervisor_is_taken_over(tree, make_tree):
    """Goal: no manual cleaning. Method: SIGKILL supervisor and guard, so that no one could clean up."""
    tree.add("router")
    tree.start()
    tree.wait_ready()
    (tree.run_directory / "old.ipc").touch()
    guard_pid = tree.guard_pid()
    os.kill(guard_pid, signal.SIGSTOP)
    tree.signal(signal.SIGKILL)
    os.kill(guard_pid, signal.SIGKILL)
    tree.wait()
    assert (tree.run_directory / "old.ipc").exists()
    after = make_tree()
    after.run_directory = tree.run_directory
    after.add("router")
    after.start()
    after.wait_ready()
    assert not (tree.run_directory / "old.ipc").exists()
    after.signal(signal.SIGTERM)
    assert after.wait() == 0
    assert not tree.run_directory.exists()


def test_bystanders_in_no_tree_are_never_touched(tree, make_tree):
    """Goal: two trees side by side; the end of one, by SIGKILL, leaves the other as it was."""
    tree.add("router", grandchild=True, daemon=True)
    other = make_tree()
    other.add("router", grandchild=True, daemon=True)
    for one in (tree, other):
        one.start()
        one.wait_ready()
    before = set(other.pids())
    tree.signal(signal.SIGKILL)
    tree.wait()
    tree.wait_nothing_left(3)
    assert set(other.pids()) >= before
    other.signal(signal.SIGTERM)
    assert other.wait() == 0
