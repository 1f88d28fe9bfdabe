"""A standby: it waits without a word, takes over when the life before it ends, and never outlives the tree."""

from __future__ import annotations

import os
import signal
import time

STANDBY = {"has_standby": True}


def standbys(tree, name="worker"):
    """Pids of the standbys of `name`, in the order of their spawning."""
    return [event["process_pid"] for event in tree.events("process.spawned") if event["process"] == name and event["is_standby"]]


def wait_standby(tree, count=1):
    tree.wait_until(lambda: len(standbys(tree)) >= count, f"standby number {count}")
    return standbys(tree)[-1]


def test_the_standby_takes_over_and_another_one_stands_by(tree):
    tree.add("worker", spec=STANDBY)
    tree.start()
    tree.wait_ready()
    for number in range(1, 4):
        standby = wait_standby(tree, number)
        assert tree.states("worker").count("ready") == number, "it said something before its turn"
        working = tree.events("process.spawned")[-2]["process_pid"]
        os.kill(working, signal.SIGKILL)
        tree.wait_ready(times=number + 1)
        assert [event["process_pid"] for event in tree.events("process.turn_given")][-1] == standby
        assert working not in tree.pids()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    tree.wait_nothing_left(3)


def test_start_timeout_counts_from_the_turn(tree):
    tree.limits["start_timeout_s"] = 1.0
    tree.stop_clock()
    tree.add("worker", spec=STANDBY)
    tree.start()
    tree.wait_ready()
    wait_standby(tree)
    tree.move_clock(1.5)
    os.kill(tree.events("process.spawned")[0]["process_pid"], signal.SIGKILL)
    tree.wait_ready(times=2)
    assert not tree.events("process.start_timed_out")
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_a_standby_that_ends_is_replaced_and_the_working_life_goes_on(tree):
    tree.add("worker", spec=STANDBY, grandchild=True)
    tree.start()
    tree.wait_ready()
    first = wait_standby(tree)
    os.kill(first, signal.SIGKILL)
    wait_standby(tree, 2)
    assert tree.states("worker") == ["starting", "started", "ready"]
    assert len(tree.events("process.standby_lost")) == 1
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    tree.wait_nothing_left(3)


def test_standbys_that_always_end_are_given_up_and_nothing_else_suffers(tree):
    tree.limits |= {"backoff_initial_s": 0.01, "backoff_max_s": 0.02, "crash_loop_restarts": 3}
    tree.add("worker", spec=STANDBY, standby_exit=3)
    tree.start()
    tree.wait_ready()
    tree.wait_until(lambda: None in [event["delay_s"] for event in tree.events("process.standby_lost")], "given up")
    time.sleep(0.3)
    assert len(standbys(tree)) == 4
    os.kill(tree.events("process.spawned")[0]["process_pid"], signal.SIGKILL)
    tree.wait_ready(times=2)
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    tree.wait_nothing_left(3)


def test_kill_of_the_supervisor_leaves_no_standby(tree):
    tree.add("worker", spec=STANDBY, grandchild=True)
    tree.start()
    tree.wait_ready()
    wait_standby(tree)
    tree.signal(signal.SIGKILL)
    tree.wait()
    tree.wait_nothing_left(3)


def test_working_life_and_standby_killed_together(tree):
    tree.add("worker", spec=STANDBY)
    tree.start()
    tree.wait_ready()
    standby = wait_standby(tree)
    for pid in (standby, tree.events("process.spawned")[0]["process_pid"]):
        os.kill(pid, signal.SIGKILL)
    tree.wait_ready(times=2)
    wait_standby(tree, 2)
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    tree.wait_nothing_left(3)
