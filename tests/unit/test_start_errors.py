"""Goal: what an operator got wrong is told in a line that names it, never in a traceback. Method: each fault, where it comes out.

Tests may run as root, who may read everything: permissions that are missing are made up.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headrace import service
from headrace.cli.main import main
from headrace.errors import ConfigError
from headrace.home import expand_home
from headrace.lifecycle import State
from headrace.service import ServiceContext
from headrace.telemetry import traces
from headrace.wire import topology
from headrace.wire.fake import FakeNetwork
from services.router.config import Settings as RouterSettings
from services.router.service import RouterService


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def context(run_directory: Path, **changes: Any) -> ServiceContext:
    return ServiceContext.for_test("router", FakeNetwork().wire("router", "router-0"), run_directory=run_directory, **changes)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(user: object) -> Any:
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


@pytest.fixture
def closed_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model store that this process may not enter."""

    for name in ("is_file", "iterdir"):
        former: Callable[[Path], Any] = getattr(Path, name)

        def look(path: Path, former: Callable[[Path], Any] = former) -> Any:
            if path.is_relative_to(tmp_path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return former(path)

        monkeypatch.setattr(Path, name, look)
    return tmp_path


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("command", [["models", "list"], ["serve"], ["doctor"], ["models", "pull", "smollm2-135m-instruct"]])
def test_a_home_that_nobody_knows(command: list[str]) -> None:
    result = run(*command)
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert "model.store '~/.cache/headrace/models'" in result.output
    assert "set HOME" in result.output


@pytest.mark.usefixtures("homeless")
def test_a_home_that_nobody_knows_stops_a_service_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router.data_directory '~/.*set HOME"):
        RouterService(context(tmp_path), RouterSettings())
    assert expand_home("/data", "router.data_directory") == Path("/data")


@pytest.mark.parametrize("command", [["models", "list"], ["models", "show", "m"]])
def test_a_store_that_may_not_be_entered(closed_store: Path, command: list[str]) -> None:
    result = run(*command, "--store", str(closed_store))
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert f"{closed_store}" in result.output
    assert "cannot be read (Permission denied)" in result.output


def test_doctor_tells_a_store_that_may_not_be_entered(closed_store: Path) -> None:
    result = run("doctor", "--json", "--model-store", str(closed_store))
    assert result.exit_code == 1
    whats = [finding["what"] for finding in json.loads(result.output)["findings"]]
    assert any(f"{closed_store}" in what and "Permission denied" in what for what in whats)


def test_a_name_that_no_file_can_have() -> None:
    result = run("models", "show", "a" * 300)
    assert result.exit_code == 2
    assert "cannot be read (File name too long)" in result.output


def test_a_file_in_the_place_of_a_directory_is_one_line_of_any_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("keys", "create", str(tmp_path / "file" / "keys"))
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert f"Not a directory: '{tmp_path / 'file' / 'keys'}'" in result.output


def run_failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[tuple[State, str]]]:
    """Status of a service whose start fails so, and what its supervisor was told."""
    told: list[tuple[State, str]] = []

    def fail() -> Any:
        raise error

    notifier = SimpleNamespace(state=lambda state, detail: told.append((state, detail)))
    monkeypatch.setattr(service, "attach", lambda: SimpleNamespace(notifier=notifier, standby_fd=None))
    monkeypatch.setattr(service, "raise_open_files_limit", lambda: None)
    monkeypatch.setattr(service, "settings_from_process", fail)
    return service.run_service("router"), told


def test_a_file_that_stops_a_service_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/somewhere")
    message = "[Errno 13] Permission denied: '/somewhere'"
    assert run_failing(error, monkeypatch) == (1, [(State.FAILED, message)])
    assert capfd.readouterr().err == f"headrace router: {message}\n"


def test_what_names_no_file_is_a_fault_of_ours_and_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionResetError):
        run_failing(ConnectionResetError(errno.ECONNRESET, "reset"), monkeypatch)


def test_a_trace_file_that_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"telemetry.trace_file {tmp_path} cannot be written to \(Is a directory\)"):
        traces.configure(service="router", instance="router-0", file=str(tmp_path))


def test_a_history_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "history.sqlite").write_bytes(b"no database\n" * 1000)
    with pytest.raises(ConfigError, match=rf"router.history is sqlite, and {tmp_path}/history.sqlite cannot be used"):
        RouterService(context(tmp_path), RouterSettings(history="sqlite", data_directory=str(tmp_path)))
    assert (tmp_path / "history.sqlite").read_bytes().startswith(b"no database"), "it may be of worth to somebody"


def test_a_run_directory_is_needed_for_ipc_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "run"
    with pytest.raises(ConfigError, match=rf"run directory {nowhere} cannot be made \(Not a directory\).*wire.router_bind"):
        context(nowhere).bind_address(topology.ROUTER_BACKPLANE)
    over_tcp = context(nowhere, wire__router_bind="tcp://127.0.0.1:0")
    assert over_tcp.bind_address(topology.ROUTER_BACKPLANE) == "tcp://127.0.0.1:0"
    made = context(tmp_path / "run").bind_address(topology.ROUTER_BACKPLANE)
    assert made == f"ipc://{tmp_path}/run/router.sock"
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_a_machine_whose_name_has_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(ConfigError, match=r"has no address \(Name or service not known\): set wire.advertise_host"):
        context(tmp_path).advertised_address("tcp://*:7100")
    assert context(tmp_path, wire__advertise_host="here").advertised_address("tcp://*:7100") == "tcp://here:7100"
