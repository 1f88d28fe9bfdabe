"""One server for the official SDKs, which leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server


@pytest.fixture(scope="session")
def server(default_model_directory: Path, model_store: Path) -> Iterator[Server]:
    """A running server with the default model."""
    with Server(model_store) as running:
        yield running
