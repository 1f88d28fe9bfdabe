"""What is known of an installation and its machine: plain values, collected by `collect.py`, judged by `findings.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine, as the worker sees it.

    Attributes:
        system: Kernel and processor architecture, for example `Linux 6.8.0 x86_64`.
        cpu: The processor's name; empty where the kernel does not tell.
        num_cpus: CPUs that this process may run on.
        num_cores: Physical cores among them, within the container's share: the worker's threads.
        available_bytes: Memory that can still be taken.
        cpu_features: Those that the kernels or torch choose by.
    """

    system: str
    cpu: str
    num_cpus: int
    num_cores: int
    available_bytes: int
    cpu_features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU that torch can use."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True, slots=True)
class Torch:
    """torch, or the lack of it.

    Attributes:
        version: None where it is not installed.
        build: What it was built for: `CPU`, `CUDA 12.8`, `ROCm 6.4`; empty where it could not be imported.
        error: Why it could not be imported, or its devices not be listed; empty when all went well.
        devices: GPUs that it can use.
        driver: The GPU driver that the kernel has loaded, for example `NVIDIA 570.86`; empty for none.
        triton_version: None where it is not installed.
        triton_wanted: What torch itself asks for, for example `triton==3.7.1`; empty for a build that needs none.
        triton_owners: Distributions that have installed a package of the name `triton`, with their versions.
        triton_tried: Versions that the kernels are tried with.
        launch_problem: What Triton lacks to launch kernels on a GPU that is there, and what to do; None where it lacks nothing.
    """

    version: str | None
    build: str
    error: str
    devices: tuple[Device, ...]
    driver: str
    triton_version: str | None
    triton_wanted: str = ""
    triton_owners: tuple[str, ...] = ()
    triton_tried: tuple[str, ...] = ()
    launch_problem: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The native CPU kernels.

    Attributes:
        is_built: Whether the library is there and loads.
        instruction_set: The one that this CPU gets; empty without the library.
        error: Why it cannot be used; empty when it can.
        compiler: Path of a C++ compiler; empty for none.
    """

    is_built: bool
    instruction_set: str
    error: str
    compiler: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the store; `problem` is why it cannot be used, and empty when it can."""

    name: str
    architecture: str
    size_bytes: int
    problem: str


@dataclass(frozen=True, slots=True)
class Port:
    """A port that `serve` takes. `user` has it: empty for nobody, `headrace` for a server of ours, else `another program`."""

    what: str
    host: str
    number: int
    user: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it.

    Attributes:
        missing_packages: Service → distributions that it needs and that are not installed.
        wanted_model: The model that the settings name.
        wanted_problem: Why it cannot be served; empty when it can.
        needs_torch: Whether the settings have a worker that computes.
        store: Directory of models.
    """

    headrace_version: str
    python_version: str
    machine: Machine
    torch: Torch
    native: NativeKernels
    missing_packages: Mapping[str, tuple[str, ...]]
    store: str
    models: tuple[Model, ...]
    wanted_model: str
    wanted_problem: str
    needs_torch: bool
    ports: tuple[Port, ...]
