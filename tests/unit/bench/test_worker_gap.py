"""A worker's idle time, read from its metrics page."""

from __future__ import annotations

import pytest

from bench.serve.worker_gap import WorkerMetricsError, WorkerTimes, parse_worker_times

PAGE = """\
# TYPE headrace_worker_steps_total counter
headrace_worker_steps_total 40.0
# TYPE headrace_worker_step_seconds histogram
headrace_worker_step_seconds_bucket{le="+Inf"} 40.0
headrace_worker_step_seconds_count 40.0
headrace_worker_step_seconds_sum 2.0
# TYPE headrace_worker_idle_seconds_total counter
headrace_worker_idle_seconds_total 0.5
"""


def test_times_are_read_and_their_difference_has_a_share() -> None:
    times = parse_worker_times(PAGE)
    assert times == WorkerTimes(idle_s=0.5, busy_s=2.0, num_steps=40)
    added = times.since(WorkerTimes(idle_s=0.4, busy_s=1.1, num_steps=10))
    assert added.num_steps == 30
    assert added.idle_share == pytest.approx(0.1)
    assert WorkerTimes(0, 0, 0).idle_share == 0


def test_a_page_that_is_no_workers_is_refused() -> None:
    with pytest.raises(WorkerMetricsError, match="headrace_worker_idle_seconds_total"):
        parse_worker_times("up 1\n")
