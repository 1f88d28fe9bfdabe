"""The Node client's example runs against a real server, and what it shows is true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.process_tree import wait_until
from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.node

EXAMPLE = Path(__file__).resolve().parents[2] / "clients" / "node" / "examples" / "stream-a-chat.mjs"


def test_the_example_streams_cancels_and_shows_traces(default_model_directory: Path, model_store: Path) -> None:
    server = Server(model_store)
    server.settings["telemetry_trace_file"] = str(server.trace_file)
    with server:
        done = subprocess.run(
            ["node", str(EXAMPLE), server.grpc],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            cwd=EXAMPLE.parent.parent,
        )
        assert done.returncode == 0, done.stderr
        assert "Tokyo" in done.stdout.splitlines()[0]
        assert "cancelled after 10 pieces" in done.stdout
        trace_ids = set(re.findall(r"trace ([0-9a-f]{32})", done.stdout))
        assert len(trace_ids) == 2
        wait_until(lambda: trace_ids <= {span["trace_id"] for span in server.spans()}, WAIT_S, "both traces are in the trace file")
        wait_until(lambda: server.metric("headrace_router_open_requests") == 0, WAIT_S, "nothing is open any more")
