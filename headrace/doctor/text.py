"""Facts and findings as rows of text, and as one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from headrace.doctor.facts import Facts, Torch
from headrace.doctor.findings import Finding, can_serve

_GIBIBYTE = 1 << 30
_MEGABYTE = 1_000_000


def document(facts: Facts, found: list[Finding]) -> dict[str, Any]:
    """Everything, for programs."""
    return {"can_serve": can_serve(found), "findings": [asdict(finding) for finding in found], "facts": asdict(facts)}


def rows(facts: Facts) -> list[tuple[str, str]]:
    """The facts, title and text."""
    machine, native = facts.machine, facts.native
    memory = f"{machine.available_bytes / _GIBIBYTE:.1f} GiB of memory free"
    lines = [
        ("headrace", facts.headrace_version),
        ("machine", f"{machine.system}, {machine.cpu or 'unknown processor'}"),
        ("", f"{machine.num_cores} cores for computing ({machine.num_cpus} CPUs), {memory}"),
        ("", f"CPU features: {' '.join(machine.cpu_features) or 'none of note'}"),
        ("python", facts.python_version),
        *_torch_rows(facts),
        ("triton", _triton_text(facts.torch)),
        ("native kernels", f"built, {native.instruction_set} on this CPU" if native.is_built else f"not usable: {native.error}"),
        ("models", f"in {facts.store}" if facts.models else f"none in {facts.store}"),
    ]
    for model in facts.models:
        is_wanted = " (the settings name it)" if model.name == facts.wanted_model else ""
        told = f"damaged: {model.problem}" if model.problem else f"{model.architecture}, {model.size_bytes / _MEGABYTE:.1f} MB"
        lines.append(("", f"{model.name}: {told}{is_wanted}"))
    for index, port in enumerate(facts.ports):
        user = f"in use by {port.user}" if port.user else "free"
        lines.append(("" if index else "ports", f"{port.host}:{port.number} {user} ({port.what})"))
    return lines


def _torch_rows(facts: Facts) -> list[tuple[str, str]]:
    torch = facts.torch
    if torch.version is None:
        return [("torch", "not installed")]
    lines = [("torch", f"{torch.version}, built for {torch.build}" if torch.build else f"{torch.version}, cannot be imported")]
    lines += [("", f"GPU: {gpu.name}, {gpu.capability}, {gpu.memory_bytes / _GIBIBYTE:.1f} GiB") for gpu in torch.devices]
    lines.append(("", f"GPU driver: {torch.driver or 'none'}"))
    return lines


def _triton_text(torch: Torch) -> str:
    there = ", ".join(torch.triton_owners) or "not installed"
    wanted = f"; torch asks for {torch.triton_wanted}" if torch.triton_wanted else ""
    return f"{there}{wanted}; the kernels are tried with {', '.join(torch.triton_tried) or 'none'}"


def finding_lines(found: list[Finding]) -> list[str]:
    """What to know and do, and the verdict last."""
    lines = [f"{finding.level}: {finding.what}\n    {finding.todo}" for finding in found]
    return [*lines, "headrace can serve." if can_serve(found) else "headrace cannot serve yet."]
