"""What only a GPU can show. Without one these tests are skipped and say why; what can be held of them anywhere still runs.

Nothing here is imported that imports Triton before a test runs: other suites of the same process may want its interpreter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def missing() -> str | None:
    """Why there is no GPU to test on; None where there is one."""
    from services.worker.device import find_device

    device, reason = find_device("auto")
    return reason if device.name == "cpu" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.get_closest_marker("gpu") and Path(__file__).parent in item.path.parents]
    reason = missing() if ours else None
    for item in ours if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    from services.worker.device import find_device

    return find_device("auto")[0].torch_device
