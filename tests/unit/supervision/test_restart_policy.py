from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.supervision.limits import SupervisionLimits
from headrace.supervision.restart_policy import RestartPolicy, backoff_s

NS = 1_000_000_000
LIMITS = SupervisionLimits(
    backoff_initial_s=0.1, backoff_max_s=3.0, crash_loop_restarts=6, crash_loop_window_s=100.0, healthy_after_s=10.0
)


def test_delays_double_up_to_the_maximum():
    policy = RestartPolicy(LIMITS)
    delays = [policy.on_exit(number * NS) for number in range(6)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.0])


def test_one_restart_more_than_the_limit_gives_up():
    policy = RestartPolicy(LIMITS)
    assert [policy.on_exit(number * NS) is None for number in range(8)] == [False] * 6 + [True] * 2


def test_restarts_that_left_the_window_do_not_count():
    policy = RestartPolicy(LIMITS)
    for number in range(6):
        policy.on_exit(number * NS)
    assert policy.on_exit(100 * NS) is not None
    assert policy.on_exit(100 * NS) is None


def test_a_healthy_life_brings_the_initial_delay_back_and_a_short_one_does_not():
    policy = RestartPolicy(LIMITS)
    policy.on_exit(0)
    policy.on_started(1 * NS)
    assert policy.on_exit(10 * NS) == pytest.approx(0.2)
    policy.on_started(11 * NS)
    assert policy.on_exit(21 * NS) == pytest.approx(0.1)


def test_a_life_that_never_started_is_not_healthy_however_long():
    policy = RestartPolicy(LIMITS)
    policy.on_exit(0)
    assert policy.on_exit(99 * NS) == pytest.approx(0.2)


@settings(deadline=None)
@given(num_before=st.integers(0, 10**9), initial_s=st.floats(1e-6, 1e6), factor=st.floats(1, 1e9))
def test_backoff_never_overflows_or_leaves_its_bounds(num_before, initial_s, factor):
    max_s = initial_s * factor
    delay_s = backoff_s(num_before, initial_s=initial_s, max_s=max_s)
    assert initial_s <= delay_s <= max_s or math.isclose(delay_s, initial_s)
    assert delay_s <= backoff_s(num_before + 1, initial_s=initial_s, max_s=max_s)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40 * NS), st.booleans()), max_size=60))
def test_never_more_restarts_in_a_window_than_allowed_and_delays_match_a_plain_model(lives):
    """Goal: the sliding window and the reset hold for any history. Method: a list of all granted restarts as the model."""
    policy = RestartPolicy(LIMITS)
    granted: list[int] = []
    in_a_row, now_ns = 0, 0
    for length_ns, has_started in lives:
        if has_started:
            policy.on_started(now_ns)
        now_ns += length_ns
        delay_s = policy.on_exit(now_ns)
        if has_started and length_ns >= LIMITS.healthy_after_s * NS:
            in_a_row = 0
        recent = [at for at in granted if now_ns - at < LIMITS.crash_loop_window_s * NS]
        if len(recent) >= LIMITS.crash_loop_restarts:
            assert delay_s is None
            continue
        assert delay_s == pytest.approx(min(LIMITS.backoff_max_s, LIMITS.backoff_initial_s * 2**in_a_row))
        granted.append(now_ns)
        in_a_row += 1
        assert policy.num_recent_restarts == len(recent) + 1
