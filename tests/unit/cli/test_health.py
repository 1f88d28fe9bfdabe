"""Goal: `headrace health` says yes or no, and why, whatever listens on the port and whatever the environment says of proxies."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result

from headrace.cli.main import main
from headrace.config.load import load_settings
from headrace.doctor import collect
from tests.patience import WAIT_S

Answering = Callable[[bytes], int]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Gives a port on which one connection is answered with these bytes."""
    made: list[tuple[socket.socket, threading.Thread]] = []

    def start(answer: bytes) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(WAIT_S)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(WAIT_S)
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        made.append((listener, thread))
        return int(listener.getsockname()[1])

    yield start
    for listener, thread in made:
        thread.join(WAIT_S)
        listener.close()


def http(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def ask(port: int | str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["health", "router", *arguments], env={"HEADRACE_TELEMETRY_ROUTER_METRICS_PORT": str(port)})


@pytest.mark.parametrize(("status", "exit_code"), [("200 OK", 0), ("503 Service Unavailable", 1)])
def test_the_answer_is_shown_and_is_the_exit_status(answering: Answering, status: str, exit_code: int) -> None:
    result = ask(answering(http(status, '{"ready": 1}')), "--ready")
    assert (result.exit_code, result.output) == (exit_code, '{"ready": 1}\n')


def test_a_proxy_of_the_environment_is_not_asked(answering: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    # What a process has looked up of proxies, it keeps.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert ask(answering(http("200 OK", "{}"))).exit_code == 0
    port = answering(http("200 OK", '{"service": "router"}'))
    assert {each.user for each in collect.port_facts(settings_with(port)) if each.number == port} == {"headrace"}


def settings_with(port: int) -> collect.Settings:
    return load_settings(flags={"telemetry.router_metrics_port": port})


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_another_program_on_the_port_is_a_no(answering: Answering, answer: bytes) -> None:
    result = ask(answering(answer))
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "/health: " in result.output
    port = answering(answer)
    assert {each.user for each in collect.port_facts(settings_with(port)) if each.number == port} == {"another program"}


@pytest.mark.parametrize("port", ["null", "0"])
def test_a_port_that_is_not_set_cannot_be_asked(port: str) -> None:
    result = ask(port)
    assert result.exit_code == 2
    assert f"telemetry.router_metrics_port is {port}, " in result.output
