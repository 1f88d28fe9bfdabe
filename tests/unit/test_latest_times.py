"""Measured times of steps, and which of them count."""

from __future__ import annotations

from headrace.latest_times import NUM_TRIES, LatestTimes


def filled(*times_ns: float, lasting_steps: int | None = None, every: int = 1) -> LatestTimes:
    times = LatestTimes(lasting_steps)
    for index, time_ns in enumerate(times_ns):
        times.add(time_ns, (index + 1) * every)
    return times


def test_nothing_is_known_before_a_few_were_measured() -> None:
    assert (LatestTimes().time_ns, LatestTimes().is_known) == (0.0, False)
    assert [filled(*[1.0] * count).is_known for count in range(NUM_TRIES + 1)] == [False] * NUM_TRIES + [True]


def test_what_interrupts_a_step_does_not_count() -> None:
    assert filled(5, 900, 5, 700, 6, 800, 5, 999).time_ns == 5


def test_the_latest_count_alone() -> None:
    assert filled(*[1.0] * 20, *[9.0] * 16).time_ns == 9


def test_what_was_long_ago_is_replaced_where_that_is_asked_for() -> None:
    assert filled(1, 1, 1, 8, every=50).time_ns == 1
    assert filled(1, 1, 1, 8, lasting_steps=40, every=50).time_ns == 8
    assert filled(1, 1, 1, 8, lasting_steps=50, every=50).time_ns == 1
