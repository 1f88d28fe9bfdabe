"""Goal: which device and backend the settings give, and what is said when they cannot. Method: stand-ins for `torch.cuda`."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.errors import ConfigError
from kernels import architecture
from services.worker.backend_choice import choose_backend
from services.worker.config import Settings
from services.worker.device import GpuDevice, HostDevice, find_device, launch_problem


def fake_cuda(*, is_available: bool = True, is_compiled: bool = True) -> Any:
    return SimpleNamespace(
        is_available=lambda: is_available,
        _is_compiled=lambda: is_compiled,
        current_device=lambda: 1,
        get_device_name=lambda device: f"GPU {device.index}",
        Stream=lambda device: SimpleNamespace(),
        OutOfMemoryError=torch.OutOfMemoryError,
    )


@pytest.fixture(autouse=True)
def _capability(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    architecture.architecture_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CC", "cc")
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(headers)})
    yield
    architecture.architecture_of.cache_clear()


def test_auto_takes_a_gpu_that_is_there() -> None:
    device, reason = find_device("auto", cuda=fake_cuda(), hip=None)
    assert isinstance(device, GpuDevice)
    assert (device.name, device.torch_device, reason) == ("cuda", torch.device("cuda", 1), "GPU 1, sm_90")
    assert find_device("cuda", cuda=fake_cuda(), hip=None)[0].name == "cuda"


def test_rocm_is_told_from_cuda_by_what_torch_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device, reason = find_device("rocm", cuda=fake_cuda(), hip="7.1")
    assert (device.name, reason) == ("rocm", "GPU 1, gfx942")
    with pytest.raises(ConfigError, match=r"worker.device is cuda, but torch .* is built for rocm: set it to rocm"):
        find_device("cuda", cuda=fake_cuda(), hip="7.1")


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (fake_cuda(is_available=False, is_compiled=False), r"knows no GPU: install torch's build for the GPU"),
        (fake_cuda(is_available=False), "torch finds no GPU: is its driver there"),
    ],
)
def test_a_gpu_that_is_asked_for_and_missing_stops_the_start_and_auto_goes_on(cuda: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        find_device("cuda", cuda=cuda, hip=None)
    assert caught.value.param == "worker.device"
    device, reason = find_device("auto", cuda=cuda, hip=None)
    assert isinstance(device, HostDevice)
    assert reason.startswith("no GPU to use: ")


def test_an_architecture_without_checked_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"of architecture sm_75; the kernels are compiled and checked for sm_80, sm_90"):
        find_device("cuda", cuda=fake_cuda(), hip=None)
    assert find_device("auto", cuda=fake_cuda(), hip=None)[0].name == "cpu"


def test_a_gpu_without_a_compiler_for_its_launches_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="Triton needs a C compiler to launch kernels: install gcc"):
        find_device("cuda", cuda=fake_cuda(), hip=None)


def test_a_gpu_without_pythons_headers_for_its_launches_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "headers" / "Python.h").unlink()
    message = f"Triton needs Python's headers to launch kernels, and {tmp_path}/headers has no Python.h: install python3-dev"
    with pytest.raises(ConfigError, match=f"worker.device is cuda, but {message}"):
        find_device("cuda", cuda=fake_cuda(), hip=None)
    device, reason = find_device("auto", cuda=fake_cuda(), hip=None)
    assert (device.name, reason) == ("cpu", f"no GPU to use: {message}")


@pytest.mark.parametrize("variable", ["CPATH", "C_INCLUDE_PATH"])
def test_headers_may_be_where_compilers_look_by_themselves(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "headers" / "Python.h").unlink()
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv(variable, f"/nowhere:{tmp_path}:")
    assert launch_problem() is None


def test_headers_are_looked_for_where_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's scheme names a folder that has none, and Triton takes another in its place."""
    asked: list[str] = []
    given = sysconfig.get_paths
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: asked.append(scheme) or given(scheme))
    for scheme in ("posix_local", "venv"):
        monkeypatch.setattr(sysconfig, "get_default_scheme", lambda scheme=scheme: scheme)
        assert launch_problem() is None
    assert asked == ["posix_prefix", "venv"]


@pytest.mark.parametrize(
    ("device", "backend", "attention", "expected"),
    [
        ("cpu", "auto", "auto", "auto"),
        ("cpu", "torch", "auto", "torch"),
        ("cpu", "auto", "native", "native"),
        ("cpu", "auto", "torch", "torch"),
        ("cpu", "torch", "triton", "triton"),
        ("cuda", "auto", "auto", "triton"),
        ("rocm", "torch", "triton", "triton"),
    ],
)
def test_backends_that_go_together(device: str, backend: str, attention: str, expected: str) -> None:
    assert choose_backend(device=device, backend=backend, attention_backend=attention) == expected


@pytest.mark.parametrize(
    ("device", "backend", "attention", "message"),
    [
        ("cuda", "native", "auto", "worker.backend is native, but worker.device is cuda"),
        ("rocm", "auto", "torch", "worker.attention_backend is torch, but on worker.device rocm it can only be auto or triton"),
        ("cpu", "native", "triton", "worker.attention_backend is triton, but worker.backend is native: set that to auto"),
        ("cpu", "torch", "native", "worker.attention_backend is native, but worker.backend is torch"),
    ],
)
def test_backends_that_do_not(device: str, backend: str, attention: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_backend(device=device, backend=backend, attention_backend=attention)


def test_lack_of_memory_is_told_from_other_errors() -> None:
    gpu, host = GpuDevice("cuda", torch.device("cpu"), cuda=fake_cuda()), HostDevice()
    assert gpu.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert gpu.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not gpu.is_out_of_memory(ValueError("out of memory"))
    assert not gpu.is_out_of_memory(RuntimeError("device-side assert"))
    assert host.is_out_of_memory(MemoryError())
    assert host.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert not host.is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_cpu_captures_nothing_and_is_never_ahead() -> None:
    device, calls = HostDevice(), []
    with pytest.raises(RuntimeError, match="captures no graphs"):
        device.capture(lambda: None)
    assert device.peak_bytes(lambda: calls.append("computed")) == 0
    device.together(lambda: calls.append("first"), lambda: calls.append("second"))
    device.fence().record()
    device.fence().synchronize()
    device.release()
    assert calls == ["computed", "first", "second"]
    assert device.staging(3, torch.int64).shape == (3,)
    assert device.free_bytes() > 0
    assert device.total_bytes() == 0


def test_settings_refuse_sizes_that_are_none() -> None:
    assert Settings(graph_batch_sizes=[], kv_cache_bytes=1).graph_batch_sizes == []
    for wrong in ({"graph_batch_sizes": [0]}, {"kv_cache_bytes": 0}, {"reserve_bytes": -1}, {"device": "gpu"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)
