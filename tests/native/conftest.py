"""The native library, and every instruction set that this CPU can run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.cpu import library as native


@pytest.fixture(scope="session")
def library(native_library: None) -> Any:
    return native.load_library()


@pytest.fixture(scope="session", params=range(len(native.ISA_NAMES)), ids=native.ISA_NAMES)
def isa(request: pytest.FixtureRequest, library: Any) -> int:
    number: int = request.param
    best = library.hr_best_isa()
    if number > best:
        pytest.skip(f"this CPU runs {native.ISA_NAMES[best]} at best")
    return number


@pytest.fixture
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(list(request.node.originalname.encode()))
