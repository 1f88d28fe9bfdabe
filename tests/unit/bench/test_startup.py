"""Goal: what services say of their start is found among their other lines."""

from __future__ import annotations

import io
import json

from bench import startup


def test_phases_are_read_from_log_lines() -> None:
    lines = [
        "not JSON",
        "[1]",
        json.dumps({"event": "service.ready", "service": "worker", "total_s": 9.0}),
        json.dumps({"event": "model.warmed_up", "service": "worker", "warm_up_s": 0.04}),
        json.dumps({"event": "start.measured", "service": "worker", "imports_s": 0.5, "total_s": 1.5, "level": "info"}),
        json.dumps({"event": "start.measured", "service": "router", "imports_s": 0.6, "total_s": 0.7}),
    ]
    assert startup._phases(io.StringIO("\n".join(lines))) == {
        "worker": {"warm_up": 0.04, "imports": 0.5, "total": 1.5},
        "router": {"imports": 0.6, "total": 0.7},
    }
