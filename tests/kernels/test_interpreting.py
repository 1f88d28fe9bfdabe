"""The interpreter computes what a GPU would where the project relies on it, and is not left switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from kernels.architecture import ARCHITECTURES, INTERPRETED, UnsupportedArchitectureError, architecture_of
from kernels.interpreting import is_interpreted
from kernels.launching import KernelArgumentError
from kernels.rms_norm.launch import rms_norm
from tests.kernels.comparing import normal
from tests.patience import WAIT_S

ROOT = Path(__file__).parents[2]


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_casts_round_to_nearest_even_and_back_exactly(dtype: torch.dtype) -> None:
    x = torch.cat((normal(2000), torch.tensor([0.0, -0.0, 1e-30, 2.0**-9, 448.0, 1.00390625, 1.01171875]), normal(41, scale=1e-4)))
    narrow = torch.empty(2048, dtype=dtype)
    cast_kernel[(1,)](x, narrow, N=2048)
    assert torch.equal(narrow.float(), x.to(dtype).float())
    wide = torch.empty(2048)
    cast_kernel[(1,)](narrow, wide, N=2048)
    assert torch.equal(wide, narrow.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matrix_products_are_of_the_numbers(dtype: torch.dtype) -> None:
    a, b, c = normal(16, 16, dtype=dtype), normal(16, 16, dtype=dtype), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize(("dtype", "size"), [(torch.int8, 16), (torch.float8_e4m3fn, 16), (torch.float16, 8)], ids=str)
def test_matrix_products_smaller_than_a_gpu_multiplies_are_refused(dtype: torch.dtype, size: int) -> None:
    a, c = torch.ones(size, size).to(dtype), torch.empty(size, size)
    with pytest.raises(Exception, match=f"K >= {2 * size}"):
        dot_kernel[(1,)](a, a, c, N=size)


def test_the_interpreter_is_on_for_these_tests_alone(tmp_path: Path) -> None:
    """Method: a test of another folder, before and after one of these in one run, looks for the variable at import and when run."""
    assert is_interpreted()
    seeing = "import os\nASKED = 'TRITON_INTERPRET' in os.environ\n"
    seeing += "def test_sees_none(): assert not ASKED and 'TRITON_INTERPRET' not in os.environ\n"
    for name in ("test_before.py", "test_after.py"):
        (tmp_path / name).write_text(seeing)
    ours = f"{ROOT}/tests/kernels/test_store_kv.py::test_an_empty_step_writes_nothing"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml")]
    command += [str(tmp_path / "test_before.py"), ours, str(tmp_path / "test_after.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert "3 passed" in done.stdout, done.stdout


def test_a_cpu_stands_for_one_architecture_and_unknown_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert architecture_of(torch.device("cpu")) is INTERPRETED
    with pytest.raises(UnsupportedArchitectureError, match="device type 'meta'"):
        architecture_of(torch.device("meta"))
    architecture_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedArchitectureError, match="sm_75; the kernels are compiled and checked for sm_80"):
        architecture_of(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert architecture_of(torch.device("cuda:0")) is ARCHITECTURES["sm_100"]
    architecture_of.cache_clear()


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(KernelArgumentError, match="rms_norm: on a CPU kernels run under Triton's interpreter"):
        rms_norm(torch.zeros(1, 8), torch.zeros(8), eps=1e-5)
