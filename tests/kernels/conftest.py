"""The kernels' tests run under Triton's interpreter, on the CPU, with every new tensor poisoned.

`TRITON_INTERPRET` is set while these files are imported and while their tests run, and at no other time: other suites in the same
process, and the processes that they start, never see it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.kernels.comparing import poison_

if "triton" in sys.modules:
    raise pytest.UsageError(
        "triton was imported before tests/kernels could ask for its interpreter: run pytest tests/kernels alone"
    )


@contextmanager
def interpreter() -> Iterator[None]:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]


with interpreter():
    import triton  # noqa: F401 (its own functions are interpreted or compiled from its import on)

    from kernels.interpreting import prepare_interpreter

    prepare_interpreter()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    with interpreter():
        return (yield)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreter():
        yield


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written is NaN, or a number that no test uses: reading it cannot go unseen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args: Any, real: Any = real, **kwargs: Any) -> torch.Tensor:
            return poison_(real(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)
