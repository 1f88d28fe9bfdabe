"""The bench of a step's messages measures what it says."""

from __future__ import annotations

import pytest

from bench.micro import step_wire


@pytest.mark.parametrize("case", step_wire.CASES)
def test_each_case_is_measured(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_wire, "NUM_REPEATS", 2)
    line = step_wire.measure(case, 64)
    assert (line["running"], line["case"]) == (64, case)
    assert all(value > 0 for name, value in line.items() if name not in ("running", "case"))


def test_a_steady_plan_is_small_whatever_runs_and_a_prompt_carries_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_wire, "NUM_REPEATS", 1)
    steady = {step_wire.measure("steady", num_running)["plan_bytes"] for num_running in (64, 1024)}
    assert len(steady) == 1
    assert max(steady) < 32
    prompt_bytes = 4 * step_wire.PROMPT_TOKENS
    assert prompt_bytes < step_wire.measure("prefill", 64)["plan_bytes"] < prompt_bytes + 400
