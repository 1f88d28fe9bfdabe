"""Without a vLLM the comparison says so and gives no figure; with one that answers it takes its figures."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from bench.micro import vllm_scheduler


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_scheduler, "NUM_RUNNING", (4,))
    monkeypatch.setattr(vllm_scheduler, "NUM_WAITING", (0,))
    monkeypatch.setattr(vllm_scheduler, "NUM_STEPS", 3)


@pytest.mark.parametrize("python", ["/nowhere/python", sys.executable])
def test_without_vllm_nothing_is_made_up(python: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm_scheduler.main(["--vllm-python", python, "--model", "/nowhere", "--rounds", "1"]) == 2
    shown = capsys.readouterr()
    assert "nothing measured" in shown.err
    assert "x" not in shown.out.splitlines()[-1].split()[-1]


def test_figures_of_both_sides_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho noise\necho \'{"version": "9", "step_us": 5000.0, "step_us_p99": 6000.0}\'\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    figures = tmp_path / "figures.json"
    options = ["--vllm-python", str(fake), "--model", "/nowhere", "--rounds", "1", "--json", str(figures)]
    assert vllm_scheduler.main(options) == 0
    (line,) = json.loads(figures.read_text())["figures"]
    assert (line["running"], line["vllm_ms"], line["vllm_version"]) == (4, 5.0, "9")
    assert 0 < line["ours_ms"] < 5
    assert capsys.readouterr().out.splitlines()[-1].endswith("x")
