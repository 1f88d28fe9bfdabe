"""The tools behind `make`: help for every target, Ctrl-C ends `make up` with status 0, a suite that hangs stops no other."""

from __future__ import annotations

import importlib.util
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.patience import WAIT_S

ROOT = Path(__file__).parents[2]
TARGETS = [
    "help",
    "setup",
    "up",
    "test",
    "test-times",
    "test-gpu",
    "lint",
    "typecheck",
    "proto",
    "check",
    "fmt",
    "kernels-report",
    "bench",
    "bench-quality",
    "bench-startup",
    "bench-peers",
    "compose-test",
    "node-test",
    "clean",
]
SERVER = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
print("serving", flush=True)
time.sleep(3600)
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", TARGETS)
def test_make_help_has_one_line_for_each_target(target: str) -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:2] == ["make", target]]
    assert len(line.split()) > 3


def read_until(terminal: int, text: bytes, *, timeout_s: float = WAIT_S) -> bytes:
    """What a terminal shows until `text` is in it."""
    shown = b""
    deadline = time.monotonic() + timeout_s
    while text not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 4096)
            except OSError:
                # The other side of the terminal is closed.
                break
    return shown


def test_ctrl_c_reaches_the_server_alone_and_make_ends_with_its_status(tmp_path: Path) -> None:
    """Method: a shell on a pseudo-terminal runs make, as a person would; Ctrl-C is typed."""
    (tmp_path / "server.py").write_text(SERVER)
    recipe = f"exec {sys.executable} {ROOT / 'tools' / 'foreground.py'} {sys.executable} server.py"
    (tmp_path / "Makefile").write_text(f"up:\n\t@{recipe}\n")
    master, slave = pty.openpty()
    # setsid makes the terminal the shell's own, which Ctrl-C needs.
    command = ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"]
    shell = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path)
    os.close(slave)
    try:
        os.write(master, b"make up; echo status=$?.\n")
        read_until(master, b"serving\r\n")
        os.write(master, b"\x03")
        assert b"status=0." in read_until(master, b"status=0.")
        os.write(master, b"echo back $((20+3))\n")
        assert b"back 23" in read_until(master, b"back 23")
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait(timeout=WAIT_S)
        os.close(master)


def test_make_hands_a_sigterm_to_the_server(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(
        SERVER.replace("SIGINT, lambda *_: sys.exit(0)", "SIGTERM, lambda *_: (print('told'), sys.exit(0))")
    )
    (tmp_path / "Makefile").write_text(
        f"up:\n\t@exec {sys.executable} {ROOT / 'tools' / 'foreground.py'} {sys.executable} server.py\n"
    )
    make = subprocess.Popen(["make", "up"], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert make.stdout is not None
    with make.stdout:
        assert make.stdout.readline() == "serving\n"
        make.terminate()
        assert make.stdout.readline() == "told\n"
    make.wait(timeout=WAIT_S)


def test_a_suite_over_its_limit_is_killed_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = load("run_suites")
    folder = tmp_path / "tests" / "hangs"
    folder.mkdir(parents=True)
    (folder / "test_hangs.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(3600)\n"
    )
    monkeypatch.chdir(tmp_path)
    for limit_s in (5, 20, 80):
        assert suites.run_suite("hangs", limit_s) == suites.STOPPED
        if (tmp_path / "pid").exists():
            break
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("def test_passes(): pass", 0, ""),
        ("def test_fails(): assert False", 1, ""),
        ("", 5, ""),
        ("import os\ndef test_leaves(): os._exit(0)", 125, "its process left before its session was over"),
        (
            "import pytest\ndef test_stops(): pytest.exit('enough', returncode=0)\ndef test_never(): pass",
            125,
            "only 0 of 2 tests ran",
        ),
        ("import pytest\ndef test_skips(): pytest.skip('no GPU')", 125, "none of its 1 tests passed"),
        ("import sys\nsys.exit(0)", 3, ""),
    ],
    ids=["passes", "fails", "collects-nothing", "leaves", "stops-early", "skips-all", "leaves-at-import"],
)
def test_a_suite_passes_only_when_its_tests_ran(
    source: str, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Goal: no failure is swallowed. Method: suites that end with status 0 for a wrong reason, run as CI runs them."""
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "tests" / "kernels" / "test_it.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert load("run_suites").run_suite("kernels", WAIT_S) == status
    assert said in capfd.readouterr().err


def test_a_suite_that_should_be_there_is_missed(tmp_path: Path) -> None:
    suites = load("run_suites")
    for name in suites.LIMITS_S.keys() - {"kernels"}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_it.py").touch()
    with pytest.raises(SystemExit, match="tests/kernels holds no test"):
        suites.find_suites(tmp_path)


def test_a_suite_without_a_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "surprise").mkdir()
    (tmp_path / "surprise" / "test_it.py").touch()
    with pytest.raises(SystemExit, match="no time limit for tests/surprise"):
        load("run_suites").find_suites(tmp_path)


def test_every_suite_here_has_a_limit() -> None:
    assert "unit" in load("run_suites").find_suites(ROOT / "tests")


def test_requirements_of_an_unknown_extra_name_the_known_ones() -> None:
    with pytest.raises(SystemExit, match="no extra 'rooter'; there are router"):
        load("requirements").requirements("rooter")
