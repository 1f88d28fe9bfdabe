from __future__ import annotations

import pytest

from headrace.errors import ConfigError
from headrace.lifecycle import TRANSITIONS, State, can_change
from headrace.supervision.exit_status import describe_exit
from headrace.supervision.limits import ProcessSpec, SupervisionLimits, check_specs


def spec(name: str, *after: str) -> ProcessSpec:
    return ProcessSpec(name, ["true"], start_after=after)


def test_the_defaults_hold():
    assert SupervisionLimits().backoff_initial_s == 0.1


@pytest.mark.parametrize("name", ["backoff_initial_s", "crash_loop_restarts", "term_deadline_s", "stderr_tail_lines"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_bad_limit_is_named_with_its_value(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be greater than 0, got {value}"):
        SupervisionLimits(**{name: value})


def test_a_maximum_below_the_initial_delay_is_refused():
    with pytest.raises(ConfigError, match="backoff_max_s must be at least backoff_initial_s"):
        SupervisionLimits(backoff_max_s=0.01)


def test_specs_in_any_order_are_fine():
    check_specs([spec("c", "b", "a"), spec("b", "a"), spec("a")])


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ([], "no process to supervise"),
        ([spec("a"), spec("a")], "'a' is used twice"),
        ([spec("a/b")], "must not be empty or contain '/'"),
        ([spec("")], "must not be empty"),
        ([spec("a", "z")], "start_after of a holds 'z', which is not among: a"),
        ([ProcessSpec(name="a", argv=("x",), stop_before=("z",))], "stop_before of a holds 'z', which is not among: a"),
        ([spec("a", "b"), ProcessSpec(name="b", argv=("x",), stop_before=("a",))], "stop_before makes a cycle among: a, b"),
        ([spec("a", "a")], "cycle among: a"),
        ([spec("a"), spec("b", "c"), spec("c", "b")], "cycle among: b, c"),
    ],
)
def test_specs_that_could_never_start_are_refused(specs, says):
    with pytest.raises(ConfigError, match=says):
        check_specs(specs)


@pytest.mark.parametrize(
    ("returncode", "words"), [(0, "exit status 0"), (3, "exit status 3"), (-9, "killed by SIGKILL"), (-63, "killed by signal 63")]
)
def test_an_exit_has_words(returncode, words):
    assert describe_exit(returncode) == words


def test_final_states_are_final_and_every_state_reaches_them():
    assert TRANSITIONS.keys() == set(State)
    finals = {State.STOPPED, State.FAILED}
    for state in State:
        assert can_change(state, state)
        assert TRANSITIONS[state] >= finals if state not in finals else not TRANSITIONS[state]
    assert can_change(State.READY, State.STARTED)
    assert not can_change(State.DRAINING, State.READY)
