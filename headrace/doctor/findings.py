"""What the facts mean: what stops a server from starting, what makes it slow, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from headrace.doctor.facts import Facts, Torch

NATIVE_SPEED: Final = (
    "the worker computes with torch then, which takes 12 times as long for a decode step of one sequence and 7 times for 16 "
    "(docs/decisions/0008-native-cpu-kernels.md)"
)

_MEMORY_SHARE: Final = 1.5
"""Memory that a model may want, times its files: weights, KV pages and the other services."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. An error stops a server; a warning does not."""

    level: Literal["error", "warning"]
    what: str
    todo: str


def findings(facts: Facts) -> list[Finding]:
    """Judge; errors come first."""
    found = [*_packages(facts), *_torch(facts), *_gpu(facts), *_native(facts), *_model(facts), *_ports(facts)]
    return sorted(found, key=lambda finding: finding.level)


def can_serve(found: list[Finding]) -> bool:
    """Whether nothing stops a server."""
    return all(finding.level != "error" for finding in found)


def _packages(facts: Facts) -> Iterator[Finding]:
    for service, names in facts.missing_packages.items():
        # A worker that invents its tokens has no use for torch.
        needed = [name for name in names if name != "torch" or facts.needs_torch]
        if needed:
            todo = f"pip install 'headrace[{service}]'"
            more = '; see README.md, "Installing torch"' if "torch" in needed else ""
            yield Finding("error", f"the {service} lacks {', '.join(needed)}", todo + more)


def _torch(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if facts.needs_torch and torch.version is not None and not torch.build:
        yield Finding("error", f"torch {torch.version} cannot be imported: {torch.error}", "install it again")


def _gpu(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if torch.build in ("", "CPU"):
        if torch.driver and torch.build:
            yield Finding(
                "warning",
                f"there is a GPU driver ({torch.driver}), but torch {torch.version} is built for CPUs only",
                'to compute on the GPU install a torch built for it; see README.md, "Installing torch"',
            )
        return
    if not torch.devices:
        why = torch.error or (f"the driver is {torch.driver}" if torch.driver else "the kernel has no GPU driver")
        yield Finding(
            "warning",
            f"torch is built for {torch.build}, but finds no GPU: {why}",
            "the CPU computes; for a GPU, install its driver, and give a container the device",
        )
        return
    if torch.triton_version is None:
        yield Finding("warning", "Triton is not installed, and there is a GPU", "pip install triton")
    else:
        yield from _triton(torch)
    if torch.launch_problem is not None:
        what, todo = torch.launch_problem
        yield Finding("warning", f"the CPU computes though there is a GPU: {what}", todo)


def _triton(torch: Torch) -> Iterator[Finding]:
    """Whether the Triton that is there is the one that torch and the kernels are made for."""
    if len(torch.triton_owners) > 1:
        what = f"{' and '.join(torch.triton_owners)} share one folder, and which of them it holds is what was installed last"
        yield Finding("warning", what, f"uninstall all of them, then install {torch.triton_wanted or 'triton'} alone")
        return
    _, _, exact = torch.triton_wanted.partition("==")
    if exact and exact != torch.triton_version:
        what = f"torch {torch.version} asks for {torch.triton_wanted}, and {torch.triton_version} is installed"
        yield Finding("warning", what, f"pip install {torch.triton_wanted}")
    if torch.triton_version not in torch.triton_tried:
        tried = " and ".join(torch.triton_tried)
        what = f"the kernels are tried with Triton {tried}, not with {torch.triton_version}, which is installed"
        yield Finding("warning", what, "install torch as constraints.txt has it, or run make test-gpu before you trust it")


def _native(facts: Facts) -> Iterator[Finding]:
    native = facts.native
    if native.is_built or facts.torch.devices:
        return
    todo = (
        "run make setup, or pip install again"
        if native.compiler
        else "install a C++ compiler (apt install g++), then install again"
    )
    yield Finding("warning", f"the native CPU kernels are not there ({native.error}): {NATIVE_SPEED}", todo)


def _model(facts: Facts) -> Iterator[Finding]:
    if facts.wanted_problem:
        yield Finding(
            "error", f"the model {facts.wanted_model!r}: {facts.wanted_problem}", f"headrace models pull {facts.wanted_model}"
        )
        return
    wanted = next((model for model in facts.models if model.name == facts.wanted_model), None)
    if wanted is not None and wanted.size_bytes * _MEMORY_SHARE > facts.machine.available_bytes:
        yield Finding(
            "warning",
            f"the model's files have {wanted.size_bytes} bytes, and {facts.machine.available_bytes} bytes of memory are free",
            "free memory, or take a smaller model or quantisation",
        )


def _ports(facts: Facts) -> Iterator[Finding]:
    taken = [port for port in facts.ports if port.user]
    if any(port.user == "headrace" for port in taken):
        yield Finding("warning", "a Headrace server runs here already and has its ports", "stop it before you start another")
        return
    for port in taken:
        yield Finding(
            "error", f"port {port.number} of {port.host}, for {port.what}, cannot be bound", "stop what has it, or set another"
        )
