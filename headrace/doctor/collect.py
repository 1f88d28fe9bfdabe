"""Collects `Facts`. Nothing here raises for what is missing or broken: that is what is looked for.

Services and kernels are named by string, as everywhere on the ground floor, and asked for what they would see themselves.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from headrace.config.load import SERVICES, Settings
from headrace.doctor.facts import Device, Facts, Machine, Model, NativeKernels, Port, Torch
from headrace.errors import ModelError
from headrace.home import expand_home
from headrace.telemetry.asking import ask

FEATURES: Final = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
"""CPU features worth telling, as /proc/cpuinfo names them."""

HEALTH_TIMEOUT_S: Final = 1.0
TRITON_DISTRIBUTIONS: Final = ("triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm")
"""All of them install a package `triton`; torch's builds for ROCm, and its nightly ones, ask for one of their own."""

Import = Callable[[str], Any]


def collect(settings: Settings, *, import_module: Import = importlib.import_module, root: Path = Path("/")) -> Facts:
    """Look at everything.

    Args:
        settings: Those that `serve` would have: they name the model and the ports.
        import_module: Imports what may be missing or broken.
        root: Where /proc and /sys are.
    """
    store = expand_home(settings.model.store, "model.store")
    worker: Any = settings.sections["worker"]
    return Facts(
        headrace_version=_version("headrace") or "unknown",
        python_version=platform.python_version(),
        machine=machine_facts(import_module, root),
        torch=torch_facts(import_module, root),
        native=native_facts(import_module),
        missing_packages=missing_packages(),
        store=str(store),
        models=model_facts(store),
        wanted_model=settings.model.name,
        wanted_problem=model_problem(settings.model.name, store),
        needs_torch=worker.runner == "model",
        ports=port_facts(settings),
    )


def machine_facts(import_module: Import, root: Path) -> Machine:
    """The machine, by the worker's own rules for cores and memory."""
    machine = import_module("services.worker.machine")
    flags = machine.cpu_flags(root)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_field(root / "proc/cpuinfo", "model name"),
        num_cpus=len(os.sched_getaffinity(0)),
        num_cores=machine.num_usable_cores(root),
        available_bytes=machine.available_memory_bytes(root),
        cpu_features=tuple(feature for feature in FEATURES if feature in flags),
    )


def torch_facts(import_module: Import, root: Path) -> Torch:
    """torch's build and the GPUs that it can use. A build for GPUs on a machine without one imports like any other."""
    found = triton_facts(import_module, Torch(_version("torch"), "", "", (), _driver(root), None))
    try:
        torch = import_module("torch")
    except ImportError as error:
        # Without a distribution it is simply not there; with one, something that it needs is not.
        return replace(found, error=str(error) if found.version else "")
    except Exception as error:  # noqa: BLE001 - a broken installation may fail in any way
        return replace(found, error=f"{type(error).__name__}: {error}")
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU"
    found = replace(found, version=str(torch.__version__), build=build)
    if build == "CPU":
        return found
    try:
        devices = _devices(torch)
        problem = import_module("services.worker.device").launch_problem() if devices else None
        return replace(found, devices=devices, launch_problem=problem)
    except Exception as error:  # noqa: BLE001 - so may a driver that does not fit
        return replace(found, error=f"{type(error).__name__}: {error}")


def triton_facts(import_module: Import, torch: Torch) -> Torch:
    """Which Triton is there, which one torch asks for, and which ones the kernels are tried with."""
    versions = {name: version for name in TRITON_DISTRIBUTIONS if (version := _version(name))}
    wanted = [text.partition(";")[0].strip() for text in _requirements("torch")]
    try:
        tried = tuple(import_module("kernels.triton_versions").TRIED)
    except ImportError:
        tried = ()
    return replace(
        torch,
        triton_version=next(iter(versions.values()), None),
        triton_wanted=next((text for text in wanted if re.split(r"[^a-z-]", text)[0] in TRITON_DISTRIBUTIONS), ""),
        triton_owners=tuple(f"{name} {version}" for name, version in versions.items()),
        triton_tried=tried,
    )


def _devices(torch: Any) -> tuple[Device, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        found.append(Device(properties.name, int(properties.total_memory), capability))
    return tuple(found)


def _driver(root: Path) -> str:
    version = _text(root / "proc/driver/nvidia/version")
    found = re.search(r"Module(?: for \S+)?\s+(\d[\d.]+)", version)
    if version:
        return f"NVIDIA {found[1]}" if found else "NVIDIA"
    amd = root / "sys/module/amdgpu"
    if amd.is_dir():
        return f"amdgpu {_text(amd / 'version')}".strip()
    return ""


def native_facts(import_module: Import) -> NativeKernels:
    """Whether the native library loads, and what it chooses here."""
    try:
        compiler = import_module("kernels.cpu.build").find_compiler() or ""
        native = import_module("kernels.cpu.library")
    except ImportError as error:
        return NativeKernels(False, "", str(error), "")
    try:
        library = native.load_library()
    except native.NativeLibraryError as error:
        return NativeKernels(False, "", str(error), compiler)
    return NativeKernels(True, native.ISA_NAMES[library.hr_best_isa()], "", compiler)


def missing_packages() -> dict[str, tuple[str, ...]]:
    """Service → what its extra asks for and is not installed; services that lack nothing are left out."""
    missing: dict[str, tuple[str, ...]] = {}
    requirements = metadata.requires("headrace") or []
    for service in SERVICES:
        extra = re.compile(rf"extra\s*==\s*['\"]{service}['\"]")
        names = [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in requirements if extra.search(text)]
        absent = tuple(name for name in names if _version(name) is None)
        if absent:
            missing[service] = absent
    return missing


def model_facts(store: Path) -> tuple[Model, ...]:
    """The models of the store, read as far as their headers."""
    from headrace.models.description import describe
    from headrace.models.store import list_models

    try:
        entries = list_models(store)
    except ModelError:
        # `model_problem` tells it of the model that is wanted.
        return ()
    found = []
    for entry in entries:
        try:
            model = describe(entry.path)
            found.append(Model(entry.name, model.architecture, model.size_bytes, ""))
        except (ModelError, ImportError) as error:
            found.append(Model(entry.name, "", 0, str(error)))
    return tuple(found)


def model_problem(name: str, store: Path) -> str:
    """Why a model cannot be served; empty when its directory is whole."""
    from headrace.models.description import describe
    from headrace.models.store import resolve

    try:
        describe(resolve(name, store))
    except (ModelError, ImportError) as error:
        return str(error)
    return ""


def port_facts(settings: Settings) -> tuple[Port, ...]:
    """The ports that `serve` binds, and who has them now."""
    router: Any = settings.sections["router"]
    telemetry = settings.telemetry
    wanted: list[tuple[str, str, int | None]] = [
        ("HTTP", router.http_host, router.http_port),
        ("gRPC", router.grpc_host, router.grpc_port),
    ]
    wanted += [(f"metrics of {service}", telemetry.metrics_host, telemetry.metrics_port(service)) for service in SERVICES]
    metrics_port = telemetry.metrics_port("router")
    ours = metrics_port is not None and metrics_port > 0 and _answers_as_ours(telemetry.metrics_host, metrics_port)
    ports = []
    for what, host, number in wanted:
        if number:
            is_taken = not _can_bind(host, number)
            ports.append(Port(what, host, number, ("headrace" if ours else "another program") if is_taken else ""))
    return tuple(ports)


def _can_bind(host: str, number: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: what lingers of closed connections is in nobody's way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True


def _answers_as_ours(host: str, number: int) -> bool:
    try:
        _, body = ask(host, number, "/health", timeout_s=HEALTH_TIMEOUT_S)
        health: Any = json.loads(body)
    except (OSError, ValueError):
        return False
    return isinstance(health, Mapping) and health.get("service") == "router"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirements(distribution: str) -> list[str]:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []


def _field(path: Path, key: str) -> str:
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
