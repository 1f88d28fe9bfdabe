"""Real supervised trees, looked at from outside: /proc is asked, never the supervisor's own bookkeeping.

Every process of a tree carries a random tag in its environment or its command line, the guard by the run directory's name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.patience import WAIT_S, promised

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def tagged_pids(tag: str) -> dict[int, str]:
    """Live processes whose environment or command line holds `tag`, with their command lines."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            cmdline = Path(f"/proc/{name}/cmdline").read_bytes()
            environ = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue
        if tag.encode() in cmdline or tag.encode() in environ:
            found[int(name)] = cmdline.replace(b"\0", b" ").decode(errors="replace")
    return found


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until `condition` holds; the timeout is only there to end a broken test."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class Tree:
    """A supervisor in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.tag = f"tree{uuid.uuid4().hex}"
        self.directory = directory
        self.run_directory = directory / f"run-{self.tag}"
        self.states_path = directory / f"states-{self.tag}"
        self.stdout_path = directory / f"stdout-{self.tag}"
        self.stderr_path = directory / f"stderr-{self.tag}"
        self.specs: list[dict] = []
        self.limits: dict = {"drain_deadline_s": WAIT_S, "term_deadline_s": 1.0, "start_timeout_s": WAIT_S}
        self.options: dict = {}
        """More for the plan of tree_program.py."""
        self.popen: subprocess.Popen[bytes] | None = None

    def add(self, name: str, *, argv: list[str] | None = None, spec: dict | None = None, **behaviour: object) -> None:
        """Add a process: `behaviour` is for child_program.py, `spec` for its ProcessSpec."""
        described = json.dumps({"tag": self.tag, "name": name, **behaviour})
        program = argv or [sys.executable, str(HERE / "child_program.py"), described]
        self.specs.append({"name": name, "argv": program, **(spec or {})})

    def start(self, *, stdout: int | None = None, stderr: int | None = None) -> None:
        self.states_path.touch()
        plan = {
            "specs": self.specs,
            "limits": self.limits,
            "run_directory": str(self.run_directory),
            "states_path": str(self.states_path),
            **self.options,
        }
        plan_path = self.directory / f"plan-{self.tag}.json"
        plan_path.write_text(json.dumps(plan))
        with open(self.stdout_path, "ab") as stdout_file, open(self.stderr_path, "ab") as stderr_file:
            self.popen = subprocess.Popen(
                [sys.executable, str(HERE / "tree_program.py"), str(plan_path)],
                stdin=subprocess.DEVNULL,
                stdout=stdout_file if stdout is None else stdout,
                stderr=stderr_file if stderr is None else stderr,
                env={**os.environ, "PYTHONPATH": str(ROOT), "SUPERVISION_TEST_TAG": self.tag},
                start_new_session=True,
            )

    def stop_clock(self) -> None:
        """Before the start: the supervisor's clock stands until `move_clock`, so that no load makes a deadline pass."""
        self.options["clock_path"] = str(self.directory / f"clock-{self.tag}")
        self._clock_s = 0.0
        self.move_clock(0.0)

    def move_clock(self, seconds: float) -> None:
        """Let `seconds` pass at once. The supervisor sees it at its next look."""
        self._clock_s += seconds
        path = Path(self.options["clock_path"])
        path.with_suffix(".new").write_text(str(self._clock_s))
        path.with_suffix(".new").replace(path)

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def states(self, name: str) -> list[str]:
        """States of `name` so far, in order."""
        events = [json.loads(line) for line in self.states_path.read_text().splitlines()]
        return [state for who, state, _ in events if who == name]

    def details(self, name: str, state: str) -> list[str]:
        """What was told with each such state of `name`, in order."""
        told = [json.loads(line) for line in self.states_path.read_text().splitlines()]
        return [detail for who, found, detail in told if (who, found) == (name, state)]

    def events(self, event: str) -> list[dict]:
        """Log lines of this event."""
        lines = [json.loads(line) for line in self.stdout_path.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def wait_ready(self, *names: str, times: int = 1, timeout_s: float = WAIT_S) -> None:
        for name in names or [spec["name"] for spec in self.specs]:
            wait_until(lambda name=name: self.states(name).count("ready") >= times, timeout_s, f"{name} ready, {times} times")

    def child_pid(self, name: str) -> int:
        """Pid of the last life of `name`."""
        return [event for event in self.events("process.spawned") if event["process"] == name][-1]["process_pid"]

    def guard_pid(self) -> int:
        return next(pid for pid, cmdline in self.pids().items() if "guard import main" in cmdline)

    def pids(self) -> dict[int, str]:
        return tagged_pids(self.tag)

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        assert self.popen is not None
        return self.popen.wait(timeout_s)

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
        wait_until(condition, timeout_s, what)

    def wait_nothing_left(self, promised_s: float) -> None:
        """No process, no run directory; the limit starts now, for both."""
        begin = time.monotonic()
        end = begin + promised(promised_s)
        wait_until(lambda: not self.pids(), promised(promised_s), f"no process of the tree left, but: {self.pids()}")
        wait_until(lambda: not self.run_directory.exists(), end - time.monotonic() + 0.1, "run directory removed")
        print(f"nothing left after {time.monotonic() - begin:.2f} s, promised within {promised_s:g} s")

    def destroy(self) -> None:
        """After a failed test: leave nothing on the machine."""
        if self.popen is not None and self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path)
    yield made
    made.destroy()


@pytest.fixture
def make_tree(tmp_path: Path) -> Iterator[Callable[[], Tree]]:
    made: list[Tree] = []

    def make() -> Tree:
        made.append(Tree(tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.destroy()
