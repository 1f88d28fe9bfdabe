"""The examples of the clients run against a real server, and what they show is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.process_tree import wait_until
from tests.e2e.server import Server
from tests.patience import WAIT_S

EXAMPLES = Path(__file__).resolve().parents[2] / "clients" / "python" / "examples"


@pytest.mark.parametrize("name", ["stream_a_chat.py", "stream_a_chat_async.py"])
def test_python_examples(server: Server, name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), server.grpc], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Tokyo" in done.stdout.splitlines()[0]
    assert "cancelled after 10 pieces" in done.stdout
    trace_ids = re.findall(r"trace ([0-9a-f]{32})", done.stdout)
    assert len(set(trace_ids)) == 2
    wait_until(lambda: set(trace_ids) <= {span["trace_id"] for span in server.spans()}, WAIT_S, "both traces are in the trace file")
    wait_until(lambda: server.metric("headrace_router_open_requests") == 0, WAIT_S, "nothing is open any more")
