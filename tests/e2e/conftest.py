"""One server shared by the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server


@pytest.fixture(scope="session")
def server(default_model_directory: Path, model_store: Path) -> Iterator[Server]:
    """A running server, tracing to a file."""
    shared = Server(model_store)
    shared.settings["telemetry_trace_file"] = str(shared.trace_file)
    with shared:
        yield shared
