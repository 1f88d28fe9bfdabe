"""Goal: what the kernels take on a GPU, beside what nobody can beat. Method: the calls of the roofline on paper, timed with a cold
cache; one JSON file, `TEST_GPU_REPORT` (default build/gpu_report.json).
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.benches import Bench, benches

REPORT = Path(os.environ.get("TEST_GPU_REPORT", "build/gpu_report.json"))
SLOWEST = 20.0
"""Times the least time on paper, over which something is wrong with a kernel. Calls of a few microseconds are not held to it."""


def workload_of(bench: Bench) -> Any:
    """The workload on the roofline that a call is."""
    cases = importlib.import_module(f"kernels.{bench.op}.compile_cases")
    found = {workload.label: workload for workload in cases.workloads()}
    assert bench.label in found, f"{bench.op}: there are {', '.join(found)}"
    return found[bench.label]


def test_every_call_that_is_timed_is_on_the_roofline() -> None:
    named = [(bench.op, workload_of(bench).label) for bench in benches()]
    assert len(named) == len(set(named)) > 10


def test_a_gpu_that_is_here_is_one_that_can_be_tested() -> None:
    """Goal: a driver or a torch that do not fit the machine are no reason to skip all of this unseen."""
    from tests.gpu.conftest import missing

    here = [path for path in ("/dev/nvidia0", "/dev/kfd") if Path(path).exists()]
    assert not here or missing() is None, f"{here}: {missing()}"


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_kernels_take_what_the_roofline_lets_hope(gpu: torch.device) -> None:
    import triton
    from triton.testing import do_bench

    from kernels.aot.roofline import ACCELERATORS, attainable_s

    name = torch.cuda.get_device_name(gpu)
    product = next((each for each in ACCELERATORS if each.name in name), None)
    calls, slow = [], []
    for bench in benches():
        took_s = float(do_bench(bench.prepare(gpu), return_mode="median")) / 1e3
        least_s = attainable_s(workload_of(bench), product) if product is not None else None
        calls.append({"op": bench.op, "call": bench.label, "took_us": took_s * 1e6, "least_us": least_s and least_s * 1e6})
        if least_s is not None and took_s > max(SLOWEST * least_s, 50e-6):
            slow.append(calls[-1])
        torch.cuda.empty_cache()
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    REPORT.write_text(json.dumps({"device": name, "versions": versions, "calls": calls}, indent=1))
    assert not slow
