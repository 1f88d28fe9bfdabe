"""The delayer's table, row by row; its waits; its metrics; and lanes that step together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from headrace.telemetry.metrics import SchedulerMetrics
from services.scheduler.gauges import Gauges
from services.scheduler.prefill_delayer import Decision, DelayerLimits, LanePass, PassOutcome, PrefillDelayer, Wait, decide
from tests.unit.scheduler import builders
from tests.unit.scheduler.system import System

YES, NO = LanePass(True, 0.9), LanePass(False, 0.9)
IDLE_YES, IDLE_NO = LanePass(True, 0.2), LanePass(False, 0.2)
WAIT = Wait(num_passes=4, since_ns=100)
NOW_NS = 250


@pytest.mark.parametrize(
    ("lanes", "wait", "limits", "decision", "next_wait"),
    [
        pytest.param([YES, YES], None, (30, None), (True, "all", "no_wait", 0, 0), None, id="all, nobody has waited"),
        pytest.param([YES, YES], WAIT, (30, None), (True, "all", "wait_success", 4, 150), None, id="all, after a wait"),
        pytest.param([NO, NO], None, (30, None), (True, "none", "", 0, 0), None, id="none"),
        pytest.param([NO, NO], WAIT, (30, None), (True, "none", "", 4, 150), None, id="none ends a wait"),
        pytest.param([], WAIT, (30, None), (True, "none", "", 4, 150), None, id="no lanes"),
        pytest.param([YES, NO], None, (30, None), (False, "mixed", "delay", 0, 0), Wait(1, NOW_NS), id="some begin to wait"),
        pytest.param([NO, YES], WAIT, (30, None), (False, "mixed", "delay", 4, 150), Wait(5, 100), id="some go on waiting"),
        pytest.param([YES, NO], WAIT, (6, None), (False, "mixed", "delay", 4, 150), Wait(5, 100), id="the last denial"),
        pytest.param([YES, NO], WAIT, (5, None), (True, "mixed", "wait_timeout", 4, 150), None, id="waited long enough"),
        pytest.param([YES, NO], None, (1, None), (True, "mixed", "wait_timeout", 0, 0), None, id="a limit of 1 never waits"),
        pytest.param([YES, NO], None, (0, None), (True, "mixed", "wait_timeout", 0, 0), None, id="a limit of 0 never waits"),
        pytest.param([YES, NO], None, (2, None), (False, "mixed", "delay", 0, 0), Wait(1, NOW_NS), id="a limit of 2 waits once"),
        pytest.param([IDLE_YES, NO], WAIT, (30, 0.5), (True, "mixed", "token_watermark", 4, 150), None, id="below the watermark"),
        pytest.param([LanePass(True, 0.5), NO], None, (30, 0.5), (False, "mixed", "delay", 0, 0), Wait(1, NOW_NS), id="at it"),
        pytest.param([IDLE_NO, YES], None, (30, 0.5), (False, "mixed", "delay", 0, 0), Wait(1, NOW_NS), id="idle, no prompt"),
        pytest.param([IDLE_YES, NO], None, (30, None), (False, "mixed", "delay", 0, 0), Wait(1, NOW_NS), id="no watermark"),
        pytest.param([IDLE_YES, YES], None, (30, 0.5), (True, "all", "no_wait", 0, 0), None, id="all leads over the watermark"),
    ],
)
def test_table(lanes, wait, limits, decision, next_wait) -> None:  # type: ignore[no-untyped-def]
    assert decide(lanes, wait, DelayerLimits(*limits), NOW_NS) == (Decision(*decision), next_wait)


def test_nobody_waits_for_passes_that_compute_nothing() -> None:
    limits = DelayerLimits(30, None)
    assert decide([YES, NO], WAIT, limits, NOW_NS, is_idle=True) == (Decision(True, "mixed", "wait_timeout", 4, 150), None)
    limits = DelayerLimits(30, 0.5)
    assert decide([IDLE_YES, NO], None, limits, NOW_NS, is_idle=True)[0].reason == "token_watermark"
    assert decide([YES, YES], None, limits, NOW_NS, is_idle=True)[0].reason == "no_wait"
    assert decide([NO, NO], None, limits, NOW_NS, is_idle=True)[0].reason == ""


def test_a_clock_that_jumps_back_gives_no_negative_wait() -> None:
    decision, _ = decide([YES, YES], Wait(1, 1000), DelayerLimits(), 10)
    assert decision.waited_ns == 0


@pytest.mark.parametrize(("field", "value"), [("max_delay_passes", -1), ("token_usage_low_watermark", 1.5)])
def test_limits_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .* got {value}"):
        DelayerLimits(**{field: value})  # type: ignore[arg-type]


PASSES = st.lists(st.lists(st.builds(LanePass, st.booleans(), st.sampled_from([0.1, 0.5, 0.9])), max_size=3), max_size=60)


@given(passes=PASSES, max_passes=st.integers(0, 6), watermark=st.sampled_from([None, 0.5]))
def test_denials_in_a_row_are_bounded_and_every_pass_is_noted_once(
    passes: list[list[LanePass]], max_passes: int, watermark: float | None
) -> None:
    limits = DelayerLimits(max_passes, watermark)
    delayers = [PrefillDelayer(limits), PrefillDelayer(limits)]
    num_denied = 0
    for now_ns, lanes in enumerate(passes):
        decisions = []
        for delayer in delayers:
            with delayer.one_pass(lanes, now_ns) as under_way:
                decisions.append(under_way.decision)
        assert decisions[0] == decisions[1]
        assert decisions[0].waited_passes == num_denied
        num_denied = 0 if decisions[0].allow else num_denied + 1
        assert num_denied <= max(0, max_passes - 1)
    assert len(delayers[0].take_outcomes()) == len(passes)
    assert not delayers[0].take_outcomes()


def test_a_pass_that_fails_is_noted_too() -> None:
    delayer = PrefillDelayer(DelayerLimits())
    with pytest.raises(OSError, match="broken"), delayer.one_pass([YES, YES], 0) as under_way:
        under_way.was_executed = True
        raise OSError("broken")
    assert [(outcome.was_executed, outcome.decision.reason) for outcome in delayer.take_outcomes()] == [(True, "no_wait")]


# Lanes of one group.


def group(num_lanes: int = 2, *, run_ahead: bool = False, **limits: float | None) -> System:
    """A system whose lanes step together."""
    system = System(builders.scheduler(run_ahead=run_ahead, delayer_limits=DelayerLimits(**limits)))  # type: ignore[arg-type]
    for _ in range(num_lanes):
        system.join(builders.capacity(group="g", num_pages=64, max_num_batched_tokens=16))
    return system


def submit(system: System, name: str, num_tokens: int = 5, *, max_tokens: int = 8) -> None:
    prompt = [len(system.streams)] * num_tokens
    system.submit(builders.sequence(system.core, name, prompt, max_tokens=max_tokens))


def step(system: System) -> list[int]:
    """All results arrive, the next pass is made; gives the new sequences of each lane's plan."""
    system.now_ns += 1_000_000
    for site in system.sites.values():
        system.deliver_result(site)
    before = [len(site.plans) for site in system.sites.values()]
    system.plan_all()
    system.check_accounting()
    return [
        sum(len(plan.new_sequences) for plan in site.plans[num:]) for num, site in zip(before, system.sites.values(), strict=True)
    ]


def reasons(outcomes: list[PassOutcome]) -> list[str]:
    return [outcome.decision.reason for outcome in outcomes]


def test_a_prefill_waits_until_all_lanes_have_one() -> None:
    system = group()
    submit(system, "a", max_tokens=20)
    submit(system, "b", max_tokens=20)
    assert step(system) == [1, 1]
    submit(system, "c")
    assert [step(system) for _ in range(3)] == [[0, 0]] * 3
    assert sorted(site.lane.num_running for site in system.sites.values()) == [1, 2]
    submit(system, "d")
    assert step(system) == [1, 1]
    outcomes = system.core.groups.take_outcomes()
    assert reasons(outcomes) == ["no_wait", "delay", "delay", "delay", "wait_success"]
    assert outcomes[-1] == PassOutcome(Decision(True, "all", "wait_success", 3, 3_000_000), was_executed=True)
    system.run()
    assert system.core.num_requests == 0


def test_a_lone_prompt_begins_at_once_where_nothing_else_is_to_do() -> None:
    system = group()
    submit(system, "alone", 40, max_tokens=20)
    assert step(system) == [1, 0]
    assert [step(system) for _ in range(2)] == [[0, 0]] * 2
    submit(system, "late")
    assert step(system) == [0, 0], "it would hold the other lane up, which decodes"
    assert reasons(system.core.groups.take_outcomes())[0] == "wait_timeout"
    system.core.abort(["alone"], system.now_ns)
    system.collect()
    assert step(system) == [0, 1]
    system.run()
    assert system.core.num_requests == 0


def test_it_waits_no_longer_than_it_may() -> None:
    system = group(max_delay_passes=4)
    submit(system, "a", max_tokens=20)
    submit(system, "b", max_tokens=20)
    step(system)
    submit(system, "c")
    assert [sum(step(system)) for _ in range(4)] == [0, 0, 0, 1]
    assert reasons(system.core.groups.take_outcomes()) == ["no_wait", "delay", "delay", "delay", "wait_timeout"]


def test_a_prompt_under_way_is_never_put_off() -> None:
    system = group()
    submit(system, "long", 40)
    submit(system, "short", 4, max_tokens=20)
    # The long prompt takes three passes; in the later ones no lane has a new one.
    assert step(system) == [1, 1]
    assert [step(system) for _ in range(2)] == [[0, 0]] * 2
    long = system.core._requests["long"]
    assert long.num_scheduled == 40
    assert reasons(system.core.groups.take_outcomes()) == ["no_wait", "", ""]


def test_an_idle_lane_prefills_at_once_with_a_watermark() -> None:
    system = group(token_usage_low_watermark=0.9)
    submit(system, "a", max_tokens=20)
    assert step(system) == [1, 0]
    assert reasons(system.core.groups.take_outcomes()) == ["token_watermark"]


def test_lanes_of_a_group_wait_for_one_another() -> None:
    system = group(run_ahead=False, max_delay_passes=0)
    submit(system, "a")
    submit(system, "b")
    system.plan_all()
    first, second = system.sites.values()
    assert [len(site.plans) for site in (first, second)] == [1, 1]
    system.deliver_result(first)
    system.plan_all()
    assert [len(site.plans) for site in (first, second)] == [1, 1], "the other is still at its step"
    system.deliver_result(second)
    system.plan_all()
    assert [len(site.plans) for site in (first, second)] == [2, 2]


def test_a_plan_made_when_another_lane_asked_is_not_left_waiting() -> None:
    system = group(max_delay_passes=3)
    submit(system, "a")
    first, second = system.sites.values()
    passes = 0
    while not system.core.groups.has_plans("g"):
        assert system.core.plan(second.lane, system.now_ns) is None
        passes += 1
        assert passes < 10, "the prompt is put off for ever"
    # What happens to the sequence from now on would be unknown to the plan.
    system.plan_all()
    assert not system.core.groups.has_plans("g")
    assert [plan.num_rows for plan in first.plans] == [1]


def test_a_lost_lane_holds_up_nobody() -> None:
    system = group(run_ahead=True, max_delay_passes=0)
    for name in "abcd":
        submit(system, name)
    system.plan_all()
    system.lose(1)
    system.run()
    assert system.core.num_requests == 0
    assert all(len(stream.tokens) == 8 for stream in system.streams.values())


def test_metrics_show_outcomes_and_waits() -> None:
    registry = CollectorRegistry()
    gauges = Gauges(SchedulerMetrics(registry))
    system = group(max_delay_passes=4)
    submit(system, "a", max_tokens=20)
    submit(system, "b", max_tokens=20)
    step(system)
    submit(system, "c")
    for _ in range(4):
        step(system)
    gauges.update(system.core)

    def count(estimation: str, allow: str, reason: str, executed: str) -> float | None:
        labels = {
            "input_estimation": estimation,
            "output_allow": allow,
            "output_reason": reason,
            "actual_execution": executed,
        }
        return registry.get_sample_value("headrace_prefill_delayer_outcomes_total", labels)

    assert count("all", "true", "no_wait", "true") == 1
    assert count("mixed", "false", "delay", "false") == 3
    assert count("mixed", "true", "wait_timeout", "true") == 1
    name = "headrace_prefill_delayer_wait_passes"
    assert registry.get_sample_value(f"{name}_bucket", {"le": "0.0"}) == 1, "a prefill that did not wait"
    assert registry.get_sample_value(f"{name}_count") == 2
    assert registry.get_sample_value(f"{name}_sum") == 3
    seconds = registry.get_sample_value("headrace_prefill_delayer_wait_seconds_sum")
    assert seconds == pytest.approx(0.003)
    assert registry.get_sample_value("headrace_prefill_delayer_wait_seconds_bucket", {"le": "0.0"}) == 1
