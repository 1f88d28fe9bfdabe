"""Goal: a terminal shows how far loading is; a file or pipe does not, and both are told once where to ask."""

from __future__ import annotations

import io

import pytest

from headrace.cli.serve import StateLines
from headrace.lifecycle import LOADING, State


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_loading_is_drawn_on_a_terminal() -> None:
    terminal = Terminal()
    lines = StateLines(terminal)
    lines("worker-0", State.STARTING, "pid 7")
    for percent in (0, 40, 100):
        lines("worker-0", State.STARTING, f"{LOADING}{percent} %")
    assert terminal.getvalue().splitlines() == [
        f"worker-0 [{'.' * 30}] loading the model: 0 %",
        f"worker-0 [{'#' * 12}{'.' * 18}] loading the model: 40 %",
        f"worker-0 [{'#' * 30}] loading the model: 100 %",
    ]


def test_nothing_is_drawn_elsewhere() -> None:
    file = io.StringIO()
    StateLines(file)("worker-0", State.STARTING, f"{LOADING}40 %")
    assert file.getvalue() == ""


def test_the_address_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = StateLines()
    for state, detail in ((State.STARTED, "no worker"), (State.READY, ""), (State.READY, "http://a"), (State.READY, "http://a")):
        lines("router-0", state, detail)
    assert capsys.readouterr().out == "headrace ready: http://a\n"
