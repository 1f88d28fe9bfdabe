"""Goal: a shell's limit of open files is not ours. Method: limits of a process of its own, and those of a service that starts."""

from __future__ import annotations

import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from headrace import open_files, service
from headrace.errors import ConfigError
from tests.patience import WAIT_S

PROGRAM = """
import resource, sys
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from headrace.open_files import open_files_limit, raise_open_files_limit
raise_open_files_limit()
print(open_files_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "after"), [(128, 500, 500), (400, 400, 400)])
def test_the_soft_limit_goes_up_to_the_hard_one(soft: int, hard: int, after: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert done.stdout.split() == [str(after), str(after), str(hard)]


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [
        (1024, 1 << 20, [(65536, 1 << 20)]),
        (1024, resource.RLIM_INFINITY, [(65536, resource.RLIM_INFINITY)]),
        (1 << 20, 1 << 20, []),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, []),
    ],
)
def test_no_more_is_taken_than_is_wanted_and_nothing_is_given_back(
    soft: int, hard: int, after: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: taken.append(limits))
    open_files.raise_open_files_limit()
    assert taken == after


def test_every_service_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[bool] = []

    def wrong_settings() -> Any:
        assert raised, "before anything that opens much"
        raise ConfigError("no")

    notifier = SimpleNamespace(state=lambda state, detail: None)
    monkeypatch.setattr(service, "attach", lambda: SimpleNamespace(notifier=notifier, standby_fd=None))
    monkeypatch.setattr(service, "settings_from_process", wrong_settings)
    monkeypatch.setattr(service, "raise_open_files_limit", lambda: raised.append(True))
    assert service.run_service("router") == 2
