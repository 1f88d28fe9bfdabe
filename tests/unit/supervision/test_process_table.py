from __future__ import annotations

import os
import signal
import subprocess
import time

from headrace.supervision.process_table import ProcessEntry, descendants, kill_entry, read_entry, read_marks, read_table


def entry(pid: int, parent_pid: int) -> ProcessEntry:
    return ProcessEntry(pid, f"{pid} (x) S {parent_pid} {pid} {pid} " + "0 " * 15 + "77 0")


def test_a_name_with_brackets_and_blanks_is_read_right():
    one = ProcessEntry(5, "5 (a) S 1 (b)) Z 4 3 2 " + "0 " * 15 + "123 0 0")
    assert (one.name, one.state, one.parent_pid, one.pgid, one.session_id, one.start_ticks) == ("a) S 1 (b)", "Z", 4, 3, 2, 123)
    assert not one.is_alive


def test_descendants_follow_the_chain_and_survive_a_cycle():
    table = {pid: entry(pid, parent_pid) for pid, parent_pid in ((1, 0), (2, 1), (3, 2), (4, 1), (8, 9), (9, 8))}
    assert descendants(table, {2}) == {3}
    assert descendants(table, {1}) == {2, 3, 4}
    assert descendants(table, {8}) == {9}
    assert descendants(table, {7}) == set()


def test_this_process_is_in_the_table_as_the_kernel_says():
    one = read_table()[os.getpid()]
    assert (one.parent_pid, one.pgid, one.session_id) == (os.getppid(), os.getpgrp(), os.getsid(0))
    assert one.is_alive


def test_no_process_no_entry_and_no_marks():
    assert read_entry(2**22 + 1) is None
    assert read_marks(2**22 + 1) == ()


def test_marks_are_read_and_a_kill_hits_only_the_process_that_was_meant():
    env = {"PATH": os.environ["PATH"], "HEADRACE_SUPERVISION_MARK": "a:x.1/b:y.2"}
    with subprocess.Popen(["sleep", "1000"], env=env) as child:
        try:
            found = read_entry(child.pid)
            assert found is not None
            # Right after exec the new environment is not in its place yet.
            while not (marks := read_marks(child.pid)):
                time.sleep(0.001)
            assert marks == ("a:x.1", "b:y.2")
            found.start_ticks += 1
            assert not kill_entry(found), "another process that has got the pid"
            found.start_ticks -= 1
            assert kill_entry(found)
            assert child.wait() == -signal.SIGKILL
            assert not kill_entry(found)
        finally:
            child.kill()
