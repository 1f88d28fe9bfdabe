"""Goal: `headrace doctor` says what is there, what is missing and what to do, whatever is not installed.

Method: torch builds, drivers and machines are fakes; the command itself runs in a process where torch cannot be imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from headrace.cli.main import main
from headrace.config.load import load_settings
from headrace.doctor import collect
from headrace.doctor.facts import Facts, NativeKernels, Torch
from headrace.doctor.findings import NATIVE_SPEED, can_serve, findings
from headrace.doctor.text import document, finding_lines, rows
from kernels.cpu.library import NativeLibraryError
from tests.patience import WAIT_S

DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: gcc"


def fake_torch(*, cuda: str | None = None, hip: str | None = None, gpus: tuple[Any, ...] = ()) -> Any:
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_properties=lambda index: gpus[index]
        ),
    )


def importing(**modules: Any) -> Callable[[str], Any]:
    """An import that gives fakes by name, with `_` for the dot, and raises those that are errors."""
    modules.setdefault("services_worker_device", SimpleNamespace(launch_problem=lambda: None))

    def give(name: str) -> Any:
        found = modules.get(name.replace(".", "_"))
        if isinstance(found, Exception):
            raise found
        return found or importlib.import_module(name)

    return give


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """Facts of a whole installation on free ports."""
    settings = load_settings(flags={"model.store": str(tmp_path_factory.mktemp("store"))})
    found = collect.collect(settings, import_module=importing(torch=fake_torch()))
    free = tuple(dataclasses.replace(port, user="") for port in found.ports)
    native = NativeKernels(True, "avx2", "", "/usr/bin/g++")
    return dataclasses.replace(found, ports=free, wanted_problem="", missing_packages={}, native=native)


@pytest.mark.parametrize(
    ("torch", "root_file", "build", "driver", "message"),
    [
        (fake_torch(), None, "CPU", "", None),
        (fake_torch(), "proc/driver/nvidia/version", "CPU", "NVIDIA 570.86.15", "built for CPUs only"),
        (fake_torch(cuda="12.8"), None, "CUDA 12.8", "", "built for CUDA 12.8, but finds no GPU: the kernel has no GPU driver"),
        (fake_torch(cuda="12.8"), "proc/driver/nvidia/version", "CUDA 12.8", "NVIDIA 570.86.15", "the driver is NVIDIA 570.86.15"),
        (fake_torch(hip="6.4"), None, "ROCm 6.4", "", "built for ROCm 6.4, but finds no GPU: the kernel has no GPU driver"),
        (fake_torch(hip="6.4"), "sys/module/amdgpu/version", "ROCm 6.4", "amdgpu 6.10", "the driver is amdgpu 6.10"),
    ],
)
def test_builds_without_a_gpu(
    facts: Facts, tmp_path: Path, torch: Any, root_file: str | None, build: str, driver: str, message: str | None
) -> None:
    if root_file:
        path = tmp_path / root_file
        path.parent.mkdir(parents=True)
        path.write_text("6.10\n" if "amdgpu" in root_file else DRIVER)
    found = collect.torch_facts(importing(torch=torch), tmp_path)
    assert (found.version, found.build, found.driver, found.devices, found.error) == ("2.13.0", build, driver, (), "")
    judged = findings(dataclasses.replace(facts, torch=found))
    assert can_serve(judged)
    assert [finding.level for finding in judged] == (["warning"] if message else [])
    assert message is None or message in judged[0].what


def test_gpus_are_told_with_their_memory(facts: Facts, tmp_path: Path) -> None:
    gpu = SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)
    found = collect.torch_facts(importing(torch=fake_torch(cuda="12.8", gpus=(gpu,))), tmp_path)
    assert [(device.name, device.capability, device.memory_bytes) for device in found.devices] == [("H100", "sm_90", 80 << 30)]
    all_facts = dataclasses.replace(facts, torch=dataclasses.replace(found, triton_version=None))
    assert ("", "GPU: H100, sm_90, 80.0 GiB") in rows(all_facts)
    assert [finding.what for finding in findings(all_facts)] == ["Triton is not installed, and there is a GPU"]


@pytest.mark.parametrize(
    ("versions", "wanted", "messages"),
    [
        ({"triton": "3.7.1"}, "triton==3.7.1", []),
        ({"triton": "3.9.0"}, "triton==3.7.1", ["torch 2.13.0 asks for triton==3.7.1, and 3.9.0 is installed"]),
        ({"triton": "3.8.1"}, "triton~=3.8.0", ["the kernels are tried with Triton 3.7.1 and 3.9.0, not with 3.8.1, which"]),
        ({"triton-rocm": "3.7.1"}, "triton-rocm==3.7.1", []),
        (
            {"triton": "3.7.1", "triton-rocm": "3.7.1"},
            "triton-rocm==3.7.1",
            ["triton 3.7.1 and triton-rocm 3.7.1 share"],
        ),
    ],
)
def test_a_triton_that_is_not_the_one_of_torch_or_of_the_kernels_is_told(
    facts: Facts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    wanted: str,
    messages: list[str],
) -> None:
    monkeypatch.setattr(collect, "_version", lambda name: versions.get(name) if "triton" in name else "2.13.0")
    monkeypatch.setattr(collect, "_requirements", lambda name: ["filelock", f'{wanted}; platform_system == "Linux"'])
    gpu = SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)
    tried = SimpleNamespace(TRIED=("3.7.1", "3.9.0"))
    torch = collect.torch_facts(importing(torch=fake_torch(cuda="12.8", gpus=(gpu,)), kernels_triton_versions=tried), tmp_path)
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    all_facts = dataclasses.replace(facts, torch=torch)
    assert ("triton", f"{told}; torch asks for {wanted}; the kernels are tried with 3.7.1, 3.9.0") in rows(all_facts)
    judged = findings(all_facts)
    assert [finding.level for finding in judged] == ["warning"] * len(messages)
    assert all(finding.what.startswith(message) for finding, message in zip(judged, messages, strict=True))


def test_what_triton_lacks_to_launch_kernels_is_told_where_there_is_a_gpu(facts: Facts, tmp_path: Path) -> None:
    lacking = SimpleNamespace(launch_problem=lambda: ("Triton needs Python's headers", "install python3-dev"))
    gpu = SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)
    found = [
        collect.torch_facts(importing(torch=fake_torch(cuda="12.8", gpus=gpus), services_worker_device=lacking), tmp_path)
        for gpus in ((gpu,), ())
    ]
    judged = findings(dataclasses.replace(facts, torch=dataclasses.replace(found[0], triton_version="3.7.1")))
    assert can_serve(judged)
    assert [(finding.what, finding.todo) for finding in judged] == [
        ("the CPU computes though there is a GPU: Triton needs Python's headers", "install python3-dev")
    ]
    assert found[1].launch_problem is None


def test_a_driver_that_does_not_fit_is_no_crash(facts: Facts, tmp_path: Path) -> None:
    torch = fake_torch(cuda="12.8", gpus=(None,))
    torch.cuda.get_device_properties = lambda index: (_ for _ in ()).throw(RuntimeError("driver too old"))
    found = collect.torch_facts(importing(torch=torch), tmp_path)
    assert found.error == "RuntimeError: driver too old"
    assert "finds no GPU: RuntimeError: driver too old" in findings(dataclasses.replace(facts, torch=found))[0].what


@pytest.mark.parametrize("error", [ImportError("libgomp.so.1 is not there"), OSError("libc10.so: wrong ELF class")])
def test_a_torch_that_cannot_be_imported_stops_a_worker_that_computes(facts: Facts, tmp_path: Path, error: Exception) -> None:
    found = collect.torch_facts(importing(torch=error), tmp_path)
    assert str(error) in found.error
    judged = findings(dataclasses.replace(facts, torch=found))
    assert not can_serve(judged)
    assert "cannot be imported" in judged[0].what
    assert can_serve(findings(dataclasses.replace(facts, torch=found, needs_torch=False)))


def test_no_torch_at_all(facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_version", lambda name: None if name == "torch" else "1.0")
    found = collect.torch_facts(importing(torch=ImportError("No module named 'torch'")), tmp_path)
    assert (found.version, found.build, found.error) == (None, "", "")
    missing = collect.missing_packages()
    assert missing == {"worker": ("torch",)}
    without = dataclasses.replace(facts, torch=found, missing_packages=missing)
    assert ("torch", "not installed") in rows(without)
    (finding,) = findings(without)
    assert (finding.level, finding.what) == ("error", "the worker lacks torch")
    assert finding.todo.startswith("pip install 'headrace[worker]'")


@pytest.mark.parametrize(
    ("compiler", "todo"), [("", "install a C++ compiler (apt install g++), then"), ("/usr/bin/g++", "run make setup")]
)
def test_native_kernels_that_are_not_built_are_told_with_what_they_would_give(facts: Facts, compiler: str, todo: str) -> None:
    def fail() -> None:
        raise NativeLibraryError("the native CPU library is not built")

    library = SimpleNamespace(load_library=fail, NativeLibraryError=NativeLibraryError)
    build = SimpleNamespace(find_compiler=lambda: compiler or None)
    native = collect.native_facts(importing(kernels_cpu_library=library, kernels_cpu_build=build))
    assert native == NativeKernels(False, "", "the native CPU library is not built", compiler)
    (finding,) = findings(dataclasses.replace(facts, native=native))
    assert finding.level == "warning"
    assert "12 times as long" in finding.what and "0008-native-cpu-kernels.md" in finding.what
    assert finding.todo.startswith(todo)


def test_the_ratios_are_those_of_the_decision() -> None:
    text = (Path(__file__).parents[3] / "docs/decisions/0008-native-cpu-kernels.md").read_text()
    assert "30 ms for one sequence and 55 ms for 16" in text
    row = next(line for line in text.splitlines() if line.startswith("| whole step |"))
    one, _, sixteen, *_ = map(float, row.strip("|").split("|")[1:])
    ratios = (round(30 / one), round(55 / sixteen))
    assert f"{ratios[0]} times as long for a decode step of one sequence and {ratios[1]} times for 16" in NATIVE_SPEED


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_of_another_program_and_a_missing_model_stop_a_server(taken_port: int, tmp_path: Path) -> None:
    arguments = [
        "doctor",
        "--router-http-port",
        str(taken_port),
        "--model-store",
        str(tmp_path),
        "--telemetry-router-metrics-port",
        "0",
    ]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told["can_serve"] is False
    whats = [finding["what"] for finding in told["findings"] if finding["level"] == "error"]
    assert any(f"port {taken_port} of 127.0.0.1, for HTTP, cannot be bound" in what for what in whats)
    assert any("no model 'smollm2-135m-instruct'" in what for what in whats)
    in_words = CliRunner().invoke(main, arguments)
    assert in_words.exit_code == 1
    assert f"127.0.0.1:{taken_port} in use by another program (HTTP)" in in_words.output
    assert in_words.output.endswith("headrace cannot serve yet.\n")


def test_a_running_server_is_no_fault(facts: Facts) -> None:
    ours = tuple(dataclasses.replace(port, user="headrace") for port in facts.ports)
    judged = findings(dataclasses.replace(facts, ports=ours))
    assert can_serve(judged)
    assert judged[0].what.startswith("a Headrace server runs here already")


def test_a_model_larger_than_the_memory_is_told(facts: Facts, default_model_directory: Path) -> None:
    models = collect.model_facts(default_model_directory.parent)
    wanted = next(model for model in models if model.name == facts.wanted_model)
    assert wanted.problem == "" and wanted.size_bytes > 50_000_000
    small = dataclasses.replace(facts.machine, available_bytes=100_000_000)
    judged = findings(dataclasses.replace(facts, models=models, machine=small))
    assert [finding.level for finding in judged] == ["warning"]
    assert f"the model's files have {wanted.size_bytes} bytes" in judged[0].what


def test_a_damaged_model_is_told_and_the_others_too(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (model,) = collect.model_facts(tmp_path)
    assert (model.name, model.size_bytes) == ("broken", 0)
    assert "config.json" in model.problem


def test_documents_are_json_and_lines_end_with_the_verdict(facts: Facts) -> None:
    told = json.loads(json.dumps(document(facts, [])))
    assert told["can_serve"] is True and told["facts"]["torch"]["build"] == "CPU"
    assert finding_lines([]) == ["headrace can serve."]
    assert isinstance(facts.torch, Torch)


def test_the_command_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from headrace.cli.main import main; main(['doctor', '--json'])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["facts"]["torch"]["build"] == ""
