"""Fixtures of all suites."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

MODEL_NAME = "smollm2-135m-instruct"


def pytest_configure() -> None:
    """Handle the signals that tests send: children inherit ignored ones (a background job's SIGINT), but no handlers."""
    for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, handler)


@pytest.fixture(scope="session")
def model_store() -> Path:
    """Where the tests keep models, over runs: the store of `make up`, unless TEST_MODEL_STORE says otherwise."""
    return Path(os.environ.get("TEST_MODEL_STORE", "~/.cache/headrace/models")).expanduser()


@pytest.fixture(scope="session")
def default_model_directory(model_store: Path) -> Path:
    """The default model, pulled when it is not there yet."""
    from headrace.models.pull import pull

    return pull(MODEL_NAME, model_store)


@pytest.fixture(scope="session")
def native_library() -> None:
    """Asked for by tests of the native CPU kernels: they run wherever these can be built, and nothing else is an excuse."""
    from kernels.cpu.build import find_compiler
    from kernels.cpu.library import LIBRARY_FILE

    if LIBRARY_FILE.is_file():
        return
    if find_compiler() is None:
        pytest.skip("the native library is not built: there is no C++ compiler")
    pytest.fail("the native library is not built, and a C++ compiler is there: run make setup")


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """A temporary directory with a path short enough for ipc sockets, which pytest's own may not have."""
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    """Log lines go through the standard defaults in tests, so that capture_logs works."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
