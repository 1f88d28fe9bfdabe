"""The router as a process of its own, as a container runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.patience import WAIT_S


def test_without_ipc_no_run_directory_is_needed(tmp_path: Path) -> None:
    """Method: one that nobody can make; the router listens all the same, and stops as it should."""
    (tmp_path / "file").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")} | {
        "HEADRACE_RUN_DIRECTORY": str(tmp_path / "file" / "run"),
        "HEADRACE_WIRE_ROUTER_BIND": "tcp://127.0.0.1:0",
        "HEADRACE_ROUTER_HTTP_PORT": "0",
        "HEADRACE_ROUTER_GRPC_PORT": "null",
        "HEADRACE_TELEMETRY_ROUTER_METRICS_PORT": "null",
    }
    with subprocess.Popen([sys.executable, "-m", "services.router"], env=environment, stderr=subprocess.PIPE, text=True) as router:
        assert router.stderr is not None
        try:
            told = []
            for line in router.stderr:
                told.append(line)
                if "router.listening" in line:
                    break
            router.send_signal(signal.SIGTERM)
            rest = router.communicate(timeout=WAIT_S)[1]
        finally:
            router.kill()
    assert router.returncode == 0, "".join(told) + rest
