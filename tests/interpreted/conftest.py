"""The worker's GPU path on the CPU: Triton's kernels under their interpreter, as in the kernels' own tests.

`TRITON_INTERPRET` is set while these files are imported and while their tests run, and at no other time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch


@contextmanager
def interpreter() -> Iterator[None]:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]


with interpreter():
    if "triton" in sys.modules:
        import triton

        if not triton.knobs.runtime.interpret:
            raise pytest.UsageError("triton was imported without its interpreter: run pytest tests/interpreted alone")
    from kernels.interpreting import start_interpreter

    start_interpreter()
    from tests.parity.families import FAMILIES, make_checkpoint


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    with interpreter():
        return (yield)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreter():
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On a busy machine, two threads wait for each other most of the time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give a directory with a tiny random checkpoint of a family, made once; by its name in `FAMILIES`."""
    made: dict[Any, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        key = (name, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint")
            make_checkpoint(FAMILIES[name], made[key], **changes)
        return made[key]

    return make
