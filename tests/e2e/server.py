"""A real `headrace serve` for tests: free ports, a run directory of its own, and the real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

from tests.e2e.process_tree import processes_marked, wait_until
from tests.patience import WAIT_S


def get(url: str) -> str:
    """A page's text."""
    with urllib.request.urlopen(url, timeout=WAIT_S) as response:
        text: str = response.read().decode()
    return text


class Server:
    """One running tree. Use as a context manager; leaving it stops the tree and checks that nothing is left."""

    def __init__(self, model_store: Path, **settings: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))
        self.run_directory = self.directory / "run"
        self.trace_file = self.directory / "spans.jsonl"
        self.stderr_file = self.directory / "stderr.log"
        self.mark = f"HEADRACE_RUN_DIRECTORY={self.run_directory}"
        self.settings = {
            "model_store": str(model_store),
            "run_directory": str(self.run_directory),
            "router_http_port": "0",
            "router_grpc_port": "0",
            "router_data_directory": str(self.directory / "data"),
            # What does not exist is refused for good from the first moment.
            "router_unknown_model_wait_s": "0",
            "telemetry_log_output": "json",
            **{f"telemetry_{name}_metrics_port": "0" for name in ("router", "tokenizer", "scheduler", "worker", "detokenizer")},
            **settings,
        }
        self.http = ""
        self.grpc = ""
        self.stdout_lines: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        """The supervisor."""
        assert self._process is not None
        return self._process

    def start(self) -> Server:
        """Start and wait for the ready line."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        environment |= {f"HEADRACE_{name.upper()}": value for name, value in self.settings.items()}
        with self.stderr_file.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "headrace.cli.main", "serve"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
                cwd=self.directory,
            )
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()
        wait_until(lambda: self.http or self.process.poll() is not None, WAIT_S, f"ready line; stderr:\n{self.stderr_tail()}")
        if not self.http:
            raise AssertionError(f"ended with {self.process.returncode} before it was ready:\n{self.stderr_tail()}")
        return self

    def __enter__(self) -> Server:
        try:
            return self.start()
        except BaseException:
            self.kill_all()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.kill_all()

    def stop(self) -> int:
        """Ctrl-C; returns the exit status. A tree that does not end is killed and fails the test."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT_S)

    def kill_all(self) -> None:
        """End whatever is left, by pid."""
        for pid in processes_marked(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._process is not None:
            self._process.wait(WAIT_S)
            self._reader.join(WAIT_S)
            assert self._process.stdout is not None
            self._process.stdout.close()

    def tree(self) -> dict[int, str]:
        """Live processes of the tree by pid, as /proc shows them, the oldest first."""
        return processes_marked(self.mark)

    def pid_of(self, module: str) -> int:
        """The one process that runs a module; for a worker's, the one that works, not the younger that stands by."""
        what = f"-m {module}"
        found = [pid for pid, command in self.tree().items() if command.endswith(what)]
        assert len(found) == 1 or (found and module.startswith("services.worker")), (what, self.tree())
        return found[0]

    def wait_standby(self) -> None:
        """Until a worker stands by and has imported what it will want."""
        wait_until(self._has_standby, WAIT_S, "a worker that stands by")

    def _has_standby(self) -> bool:
        events = self.log_lines("service.standing_by")
        return bool({event["process_pid"] for event in events} & (self.tree().keys() - {self.pid_of("services.worker.rank")}))

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        """All lines of an event that were logged so far."""
        lines = self.stderr_file.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if f'"event": "{event}"' in line]

    def stderr_tail(self, num_bytes: int = 4000) -> str:
        """The end of what the tree wrote to stderr."""
        return self.stderr_file.read_text(errors="replace")[-num_bytes:] if self.stderr_file.exists() else ""

    def spans(self) -> list[dict[str, Any]]:
        """All finished spans, when `telemetry_trace_file` is `self.trace_file`."""
        return [json.loads(line) for line in self.trace_file.read_text().splitlines()] if self.trace_file.exists() else []

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's samples on the router's /metrics, of those with this label where one is given."""
        lines = get(f"{self.http}/metrics").splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name and label in line)

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.stdout_lines.append(line.rstrip())
            if line.startswith("headrace ready: "):
                _, _, addresses = line.partition(": ")
                http, grpc = addresses.split()
                self.grpc = grpc.removeprefix("grpc://")
                self.http = http
