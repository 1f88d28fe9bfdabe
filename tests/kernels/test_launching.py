"""What is launched again is launched as Triton would, and planned anew where the form of a tensor is another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from kernels.launching import KernelArgumentError, Launch, LaunchConfig, forget_plans, planned

CONFIG = LaunchConfig(num_warps=4, num_stages=2)


class FakeKernel:
    """A kernel as Triton compiles it: notes down how it is launched by Triton, and how by the driver alone."""

    arg_names = ("x_ptr", "y_ptr", "size", "eps", "HAS_Y", "BLOCK")

    def __init__(self) -> None:
        self.by_triton: list[Any] = []
        self.by_driver: list[Any] = []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> FakeKernel:
            self.by_triton.append((grid, args, kwargs))
            return self

        return launch

    def run(self, *args: Any) -> None:
        self.by_driver.append(args)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    active = SimpleNamespace(stream=7, get_current_device=lambda: 3, get_current_stream=lambda device: (device, active.stream))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    return active


def test_triton_is_asked_at_the_first_launch_alone(driver: Any) -> None:
    kernel = FakeKernel()
    # Constants in another order than the kernel's.
    launch = Launch(kernel, (5, 2), (9, 1e-6), {"BLOCK": 16, "HAS_Y": False}, CONFIG)
    launch("a", None)  # type: ignore[arg-type]
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert kernel.by_triton == [((5, 2, 1), ("a", None, 9, 1e-6), {"BLOCK": 16, "HAS_Y": False} | options)]
    assert kernel.by_driver == []
    launch("b", None)  # type: ignore[arg-type]
    driver.stream = 8
    launch("c", None)  # type: ignore[arg-type]
    common = ("function", "metadata", None, None, None)
    assert kernel.by_driver == [
        (5, 2, 1, (3, 7), *common, "b", None, 9, 1e-6, False, 16),
        (5, 2, 1, (3, 8), *common, "c", None, 9, 1e-6, False, 16),
    ]
    assert len(kernel.by_triton) == 1


def test_no_programs_are_no_launch(driver: Any) -> None:
    kernel = FakeKernel()
    for _ in range(2):
        Launch(kernel, (5, 0), (9, 1e-6), {"BLOCK": 16, "HAS_Y": False}, CONFIG)("a", None)  # type: ignore[arg-type]
    assert kernel.by_triton == kernel.by_driver == []


def test_a_plan_is_made_once_a_form() -> None:
    plans: list[Any] = []

    @planned
    def plan(x: torch.Tensor, y: torch.Tensor | None, number: float) -> int:
        if number < 0:
            raise KernelArgumentError("negative")
        plans.append((x, y, number))
        return len(plans)

    x, storage = torch.zeros(4, 6), torch.zeros(100)
    assert plan(x, None, 1.5) == plan(torch.ones(4, 6), None, 1.5) == 1
    others = [
        (x.half(), None, 1.5),
        (torch.zeros(4, 7), None, 1.5),
        (torch.zeros(4, 8)[:, :6], None, 1.5),
        (x, x, 1.5),
        (x, None, 2.5),
        (storage[1:25].view(4, 6), None, 1.5),
        (x.to("meta"), None, 1.5),
    ]
    assert [plan(*each) for each in others] == list(range(2, 9))
    assert [plan(*each) for each in others] == list(range(2, 9))
    # 16 bytes further on is the same.
    assert plan(storage[4:28].view(4, 6), None, 1.5) == 1
    for _ in range(2):
        with pytest.raises(KernelArgumentError):
            plan(x, None, -1.0)
    forget_plans()
    assert plan(x, None, 1.5) == 9


def test_no_more_forms_are_remembered_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.launching._FORMS_MAX", 3)
    made: list[int] = []
    plan = planned(lambda number: made.append(number) or len(made))
    for number in (1, 2, 3, 1, 2, 3, 4, 1):
        plan(number)
    assert made == [1, 2, 3, 4, 1]
