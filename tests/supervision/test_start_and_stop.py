"""Starting in order, stopping in reverse, and exit statuses that tell the truth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_ends_everything_with_status_0_and_nothing_left(tree, signum):
    tree.add("router", grandchild=True)
    tree.add("tokenizer", spec={"start_after": ["router"]})
    tree.start()
    tree.wait_ready()
    assert len(tree.pids()) >= 5
    tree.signal(signum)
    assert tree.wait() == 0
    assert tree.pids() == {}
    assert not tree.run_directory.exists()
    assert tree.states("router") == ["starting", "started", "ready", "draining", "stopped"]


def test_it_also_runs_on_uvloop(tree):
    tree.options["uvloop"] = True
    tree.add("router", stderr="hello\n", daemon=True)
    tree.start()
    tree.wait_ready()
    os.kill(tree.child_pid("router"), signal.SIGKILL)
    tree.wait_ready(times=2)
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    assert tree.pids() == {}
    assert tree.stderr().count("hello") == 2


def test_background_job_whose_shell_ignores_sigint_is_stopped_by_it_all_the_same(tree):
    """A program inherits ignored signals; what the test process ignores while it starts the tree is what a shell's `&` does."""
    tree.add("router")
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tree.start()
    finally:
        signal.signal(signal.SIGINT, former)
    tree.wait_ready()
    tree.signal(signal.SIGINT)
    assert tree.wait() == 0
    assert tree.pids() == {}


def test_processes_start_in_order_by_message_and_stop_in_reverse(tree, tmp_path):
    log = tmp_path / "stops"
    for name, after in (("first", []), ("second", ["first"]), ("third", ["second"])):
        tree.add(name, spec={"start_after": after}, start_s=0.3, stop_log=str(log), drain_s=0.1)
    tree.start()
    tree.wait_ready()
    order = [event["process"] for event in tree.events("process.spawned")]
    assert order == ["first", "second", "third"]
    started = [line for line in tree.states_path.read_text().splitlines() if "started" in line or "starting" in line]
    assert [line.split('"')[1::2][:2] for line in started] == [
        [name, state] for name in ("first", "second", "third") for state in ("starting", "started")
    ]
    tree.signal(signal.SIGINT)
    assert tree.wait() == 0
    assert log.read_text().split() == ["third", "second", "first"]


def test_process_that_stops_before_another_need_not_start_after_it(tree, tmp_path):
    log = tmp_path / "stops"
    tree.add("router", spec={"stop_before": ["worker"]}, stop_log=str(log), drain_s=0.3)
    tree.add("worker", stop_log=str(log))
    tree.start()
    tree.wait_ready()
    tree.signal(signal.SIGINT)
    assert tree.wait() == 0
    assert log.read_text().split() == ["router", "worker"]


def test_exit_before_started_fails_the_start_at_once_and_shows_the_stderr_tail(tree):
    tree.add("router", exit_before_started=7, stderr="line one\nTraceback: the weights are missing\n")
    tree.add("worker", spec={"start_after": ["router"]})
    tree.start()
    assert tree.wait() == 1
    last_lines = tree.stderr().splitlines()
    assert last_lines[-1] == "headrace: router: exit status 7 before it was started"
    assert "  Traceback: the weights are missing" in last_lines
    assert tree.events("process.spawned")[-1]["process"] == "router"
    tree.wait_nothing_left(3)


def test_a_killed_process_fails_the_first_start_with_its_signal_named(tree):
    tree.add("router", never_started=True)
    tree.start()
    tree.wait_until(lambda: tree.events("process.spawned"), "router spawned")
    os.kill(tree.child_pid("router"), signal.SIGKILL)
    assert tree.wait() == 1
    assert "router: killed by SIGKILL before it was started" in tree.stderr()


@pytest.mark.parametrize("says_failed", [False, True])
def test_a_config_error_of_a_child_is_the_exit_status_and_the_last_line(tree, says_failed):
    says = {"exit_before_started": 2, "says_failed": says_failed, "stderr": "port must be below 65536, got 70000\n"}
    tree.add("steady")
    tree.add("router", spec={"start_after": ["steady"]}, **says)
    tree.start()
    assert tree.wait() == 2
    assert tree.stderr().splitlines()[-1] == "port must be below 65536, got 70000"
    tree.wait_nothing_left(3)


def test_a_program_that_does_not_exist_fails_the_start(tree):
    tree.add("router", argv=["/nonexistent/program"])
    tree.start()
    assert tree.wait() == 1
    assert "No such file or directory" in tree.stderr()


def test_a_process_that_never_says_started_is_dumped_and_fails_the_start(tree):
    tree.stop_clock()
    tree.add("router", spec={"start_timeout_s": 1.0}, never_started=True, stderr="up\n")
    tree.options["dump_wait_s"] = 4.0
    tree.start()
    tree.wait_until(lambda: "up" in tree.stderr(), "the process is attached and hangs")
    tree.move_clock(1.5)
    assert tree.wait() == 1
    assert "not started within 1 s" in tree.stderr()
    assert "child_program.py" in tree.stderr(), "the stack dump names where it hung"


def test_progress_while_starting_extends_the_start_timeout(tree, tmp_path):
    tree.stop_clock()
    tree.add("worker", spec={"start_timeout_s": 1.5}, load_steps=4, load_gate=str(tmp_path / "gate"))
    tree.start()
    for step in range(4):
        tree.wait_until(lambda step=step: f"loaded {step}" in tree.stderr(), f"step {step} of the load")
        tree.move_clock(1.0)
        (tmp_path / f"gate{step}").touch()
    tree.wait_ready()
    assert not tree.events("process.start_timed_out")
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_ctrl_c_during_start_ends_with_status_0(tree):
    tree.add("router", never_started=True, grandchild=True)
    tree.add("worker", spec={"start_after": ["router"]})
    tree.start()
    tree.wait_until(lambda: len(tree.pids()) >= 4, "supervisor, guard, router and its grandchild")
    tree.signal(signal.SIGINT)
    assert tree.wait() == 0
    assert tree.pids() == {}
    assert tree.states("worker") == []


def test_a_process_that_ignores_sigterm_is_killed_and_the_status_says_so(tree):
    tree.limits |= {"drain_deadline_s": 0.5, "term_deadline_s": 0.5}
    tree.add("router", ignore_sigterm=True, grandchild=True)
    tree.start()
    tree.wait_ready()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 4
    assert tree.pids() == {}
    reasons = [event["reason"] for event in tree.events("process.signalled") + tree.events("process.killed")]
    assert reasons == ["SIGTERM", "not drained within 0.5 s", "deliver SIGTERM", "not ended within 0.5 s of SIGTERM"]


def test_a_drain_with_an_error_status_is_not_a_clean_stop(tree):
    tree.add("router", stop_exit=3)
    tree.start()
    tree.wait_ready()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 4


def test_a_second_sigint_kills_at_once(tree):
    tree.limits |= {"drain_deadline_s": 500.0}
    tree.add("router", ignore_sigterm=True, daemon=True)
    tree.add("worker", ignore_sigterm=True, spec={"start_after": ["router"]})
    tree.start()
    tree.wait_ready()
    tree.signal(signal.SIGINT)
    tree.wait_until(lambda: tree.events("supervisor.stopping"), "stopping")
    tree.signal(signal.SIGINT)
    assert tree.wait() == 130
    assert tree.pids() == {}


def test_a_live_supervisor_keeps_its_run_directory_from_another(tree, make_tree):
    tree.add("router")
    tree.start()
    tree.wait_ready()
    other = make_tree()
    other.run_directory = tree.run_directory
    other.add("router")
    other.start()
    assert other.wait() == 2
    assert f"run directory {tree.run_directory} is in use by a live supervisor (process {tree.pid})" in other.stderr()
    assert tree.run_directory.exists()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_a_closed_stderr_of_the_supervisor_does_no_harm(tree):
    reading, writing = os.pipe()
    tree.add("router", stderr="nobody hears this\n" * 100)
    tree.start(stderr=writing)
    os.close(writing)
    os.close(reading)
    tree.wait_ready()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_output_that_is_cut_off_ends_nothing_and_a_stop_is_as_clean_as_ever(tree, tmp_path):
    """What `headrace serve 2>&1 | tee log` and Ctrl-C do: tee ends at once, and the supervisor has lines of its own to tell."""
    log = tmp_path / "stops"
    reading, writing = os.pipe()
    tree.options["tells_as_serve"] = True
    tree.add("router", stop_log=str(log), drain_s=0.2, stderr="hello\n")
    tree.start(stdout=writing, stderr=writing)
    os.close(writing)
    tree.wait_ready()
    told = b""
    while b"headrace ready: http://127.0.0.1:1" not in told or b"hello" not in told:
        told += os.read(reading, 65536)
    os.close(reading)
    tree.signal(signal.SIGINT)
    assert tree.wait() == 0
    assert log.read_text().split() == ["router"], "it drained to its end"
    assert tree.pids() == {}


def test_output_that_nobody_reads_stalls_neither_the_children_nor_the_supervisor(tree):
    """A terminal that Ctrl-S has stopped, or a pager that shows its first page: the pipe is full, and stays so."""
    reading, writing = os.pipe()
    tree.options["tells_as_serve"] = True
    tree.add("router", flood_bytes=2_000_000)
    tree.start(stderr=writing)
    os.close(writing)
    tree.wait_ready()
    os.kill(int(tree.details("router", "starting")[-1].removeprefix("pid ")), signal.SIGKILL)
    tree.wait_ready(times=2)
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    os.close(reading)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_under_the_output_ends_nothing(tree, stream):
    full = os.open("/dev/full", os.O_WRONLY)
    tree.options["tells_as_serve"] = True
    tree.add("router", stderr="hello\n")
    tree.start(**{stream: full})
    os.close(full)
    tree.wait_ready()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0


def test_an_error_of_the_supervisor_itself_ends_everything_and_is_not_hidden(tree):
    tree.options["fails_at_ready"] = True
    tree.add("router", grandchild=True, daemon=True)
    tree.add("worker", ignore_sigterm=True)
    tree.start()
    assert tree.wait() == 1
    assert "the callback failed" in tree.stderr()
    assert tree.pids() == {}
    assert not tree.run_directory.exists()


def test_attach_outside_a_supervisor_changes_nothing(tmp_path):
    program = (
        "from headrace.supervision.child import attach\n"
        "from headrace.lifecycle import State\n"
        "a = attach(); a.notifier.state(State.READY); a.notifier.progress({'n': 1}); print(a.is_supervised)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, env=env, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)
