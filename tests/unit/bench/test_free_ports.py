"""Ports that nobody else will be given."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bench import free_ports as module
from bench.free_ports import free_ports


@pytest.fixture
def kernel_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "range"
    monkeypatch.setattr(module, "_KERNEL_RANGE", path)
    return path


def test_ports_lie_outside_the_kernels_range_and_differ(kernel_range: Path) -> None:
    kernel_range.write_text("20000\t60999\n")
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert 10_000 <= min(ports) <= max(ports) < 20_000


def test_a_port_in_use_is_passed_over(kernel_range: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        busy, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        monkeypatch.setattr(module.random.SystemRandom, "sample", lambda *_: [free, busy])
        kernel_range.write_text("20000 60999")
        assert free_ports(1) == [free]


@pytest.mark.parametrize("text", ["1024 65535", "what", None])
def test_some_port_is_found_whatever_the_kernel_says(kernel_range: Path, text: str | None) -> None:
    if text is not None:
        kernel_range.write_text(text)
    assert len(set(free_ports(3))) == 3
