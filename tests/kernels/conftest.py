"""The kernels' tests run under Triton's interpreter, on the CPU, with every new tensor poisoned.

`TRITON_INTERPRET` is set while these files are imported and while their tests run, and at no other time: other suites in the same
process, and the processes that they start, never see it.

`TEST_KERNEL_DEVICE=cuda` (ROCm too) has the same tests run compiled on a GPU: tensors are made there unless a test says otherwise,
and what is about the interpreter or about compiling alone is skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.launching import forget_plans
from tests.kernels.comparing import poison_

DEVICE = os.environ.get("TEST_KERNEL_DEVICE", "cpu")

NOT_ON_A_GPU = {
    "test_aot.py": "compiles for every GPU and runs nothing: the same on any machine",
    "test_barriers.py": "reads compiled code and runs nothing: the same on any machine",
    "test_interpreting.py": "is about the interpreter",
    "test_mutations.py": "is about the tests: the same on any machine",
}
"""Files whose tests a GPU tells nothing of, and why."""

if DEVICE not in ("cpu", "cuda"):
    raise pytest.UsageError(f"TEST_KERNEL_DEVICE must be cpu or cuda, got {DEVICE!r}")
if DEVICE == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError("TEST_KERNEL_DEVICE is cuda, and torch finds no GPU")
if DEVICE == "cpu" and "triton" in sys.modules:
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


@contextmanager
def gpu() -> Iterator[None]:
    # With its number, as tensors name it.
    with torch.device("cuda", torch.cuda.current_device()):
        yield


where_kernels_run = interpreter if DEVICE == "cpu" else gpu

with where_kernels_run():
    import triton  # noqa: F401 (its own functions are interpreted or compiled from its import on)

    if DEVICE == "cpu":
        from kernels.interpreting import prepare_interpreter

        prepare_interpreter()
    else:
        # What makes tensors is noted down by torch at the first of these, and must be before `_poisoned` replaces it.
        torch.empty(0)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    with where_kernels_run():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if DEVICE == "cuda" else ():
        if item.path.parent == Path(__file__).parent and item.path.name in NOT_ON_A_GPU:
            item.add_marker(pytest.mark.skip(reason=NOT_ON_A_GPU[item.path.name]))


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    # A test before this one may have put something in the place of a kernel, or of what decides a tile.
    forget_plans()
    with where_kernels_run():
        yield
    if DEVICE == "cuda" and torch.cuda.memory_reserved() > 1 << 30:
        # Tests of far offsets take gigabytes, and others of the same suite may share the GPU.
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written is NaN, or a number that no test uses: reading it cannot go unseen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args: Any, real: Any = real, **kwargs: Any) -> torch.Tensor:
            return poison_(real(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)
