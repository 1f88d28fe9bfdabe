from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.supervision.progress_watch import ProgressWatch

NS = 1_000_000_000


def watch(stall_timeout_s: float | None = 5.0) -> ProgressWatch:
    return ProgressWatch(start_timeout_s=10.0, stall_timeout_s=stall_timeout_s, now_ns=0)


def test_a_start_without_progress_times_out():
    one = watch()
    assert one.verdict(10 * NS - 1) is None
    assert one.verdict(10 * NS) == "not started within 10 s of its spawn or last progress"


def test_only_changing_counters_extend_a_start():
    one = watch()
    one.on_progress({"loaded": 1}, is_busy=True, now_ns=8 * NS)
    assert one.verdict(17 * NS) is None
    one.on_progress({"loaded": 1}, is_busy=True, now_ns=17 * NS)
    assert one.verdict(18 * NS) is not None


def test_a_process_that_never_reported_progress_is_never_stalled():
    one = watch()
    one.on_started(NS)
    assert one.deadline_ns() is None
    assert one.verdict(10**6 * NS) is None


def test_a_process_without_a_stall_timeout_is_never_stalled():
    one = watch(None)
    one.on_started(NS)
    one.on_progress({}, is_busy=True, now_ns=NS)
    assert one.verdict(10**6 * NS) is None


def test_progress_before_started_makes_silence_after_it_a_stall():
    one = watch()
    one.on_progress({"n": 0}, is_busy=False, now_ns=0)
    one.on_started(2 * NS)
    assert one.verdict(7 * NS - 1) is None
    assert one.verdict(7 * NS) == "no heartbeat for 5.0 s (limit 5 s)"


def test_idle_heartbeats_with_still_counters_are_fine():
    one = watch()
    one.on_started(0)
    for second in range(100):
        one.on_progress({"n": 3}, is_busy=False, now_ns=second * NS)
        assert one.verdict(second * NS) is None


def test_busy_heartbeats_with_still_counters_are_a_stall_that_names_them():
    one = watch()
    one.on_started(0)
    for second in range(7):
        one.on_progress({"num_steps": 3, "age": 1.5}, is_busy=second >= 2, now_ns=second * NS)
    assert one.verdict(7 * NS - 1) is None
    assert one.verdict(7 * NS) == "busy without progress for 5.0 s (limit 5 s; counters: age=1.5, num_steps=3)"


def test_busy_with_moving_counters_is_fine():
    one = watch()
    one.on_started(0)
    for second in range(100):
        one.on_progress({"n": second}, is_busy=True, now_ns=second * NS)
        assert one.verdict(second * NS) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8 * NS), st.integers(0, 2), st.booleans(), st.booleans()), max_size=40))
def test_a_verdict_comes_exactly_at_the_deadline_whatever_was_heard(events):
    one = watch()
    now_ns = 0
    for step_ns, counter, is_busy, starts in events:
        now_ns += step_ns
        if starts:
            one.on_started(now_ns)
        else:
            one.on_progress({"n": counter}, is_busy=is_busy, now_ns=now_ns)
        deadline_ns = one.deadline_ns()
        if deadline_ns is not None:
            assert one.verdict(deadline_ns - 1) is None
            assert one.verdict(deadline_ns)
