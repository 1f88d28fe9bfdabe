"""Goal: loading says how far it is, at most once a second, whichever threads read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest
import structlog
from structlog.testing import capture_logs

from headrace.lifecycle import State
from headrace.supervision.child import Notifier
from services.worker import machine, service
from services.worker.load_progress import LoadProgress


def test_a_line_is_due_once_a_second() -> None:
    progress = LoadProgress(10.0)
    told = [progress.add(100, 1000, 10.0 + 0.4 * step) for step in range(1, 8)]
    assert told == [None, None, 30, None, None, 60, None]


def test_nothing_to_read_is_no_division() -> None:
    assert LoadProgress(0.0).add(0, 0, 2.0) == 0


def test_values_of_all_threads_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.load_progress.INTERVAL_S", 0.0)
    with capture_logs() as lines:
        tell = service.progress_log()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: tell(1, 400), range(400)))
    percents = [line["percent"] for line in lines if line["event"] == "weights.read"]
    assert len(percents) == 400
    assert max(percents) == 100


def test_blocks_are_short_lived_only_for_a_while() -> None:
    with pytest.raises(ValueError, match="inside"), machine.short_lived_blocks():
        raise ValueError("inside")
    with machine.short_lived_blocks():
        assert machine.available_memory_bytes() > 0


def test_the_supervisor_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.load_progress.INTERVAL_S", 0.0)
    told: list[tuple[State, str]] = []
    notifier = cast(Notifier, SimpleNamespace(state=lambda state, detail: told.append((state, detail))))
    with capture_logs() as lines, structlog.contextvars.bound_contextvars(service="worker"):
        service.progress_log(notifier)(1, 4)
    assert told == [(State.STARTING, "loading the model: 25 %")]
    assert [(line["service"], line["percent"]) for line in lines] == [("worker", 25)]
