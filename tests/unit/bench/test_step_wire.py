"""The bench of a step's messages drives the core into each of its cases, and counts the bytes of a link."""

from __future__ import annotations

import pytest

from bench.micro import step_wire


@pytest.mark.parametrize("num_running", [16, 64])
def test_each_case_is_reached_and_measured(num_running: int) -> None:
    lines = step_wire.measure(num_running, num_steps=3)
    assert [line["case"] for line in lines] == list(step_wire.CASES)
    for line in lines:
        assert line["num_steps"] == 3
        assert all(line[f"{part}_us"] > 0 for part in step_wire.PARTS)


def test_a_steady_plan_is_small_whatever_runs_and_a_prompt_carries_its_tokens() -> None:
    few, many = ({line["case"]: line for line in step_wire.measure(num, num_steps=2)} for num in (16, 128))
    assert few["steady"]["plan_bytes"] == many["steady"]["plan_bytes"] < 64
    assert few["rows"]["plan_bytes"] < many["rows"]["plan_bytes"]
    prompt_bytes = 4 * step_wire.PROMPT_TOKENS
    assert prompt_bytes < few["prefill"]["plan_bytes"] < prompt_bytes + 500
