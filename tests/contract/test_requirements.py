"""Each service runs with what its extra installs and no more, and the lock pins all of it."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SERVICES = ["router", "tokenizer", "scheduler", "worker", "detokenizer"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def closure(extra: str) -> set[str]:
    """Every distribution that `pip install headrace[extra]` brings here."""
    pending = [("headrace", frozenset({extra}))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            environments = [{"extra": each} for each in extras | {""}]
            if requirement.marker is None or any(requirement.marker.evaluate(environment) for environment in environments):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen} - {"headrace"}


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("headrace", "services", "kernels", "bench", include_external_packages=True, cache_dir=None)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_only_what_its_extra_installs(service: str, imports: grimp.ImportGraph) -> None:
    """Goal: a slim image never misses a module. Method: the import graph from services.<service> on, lazy imports included."""
    missing = missing_of(service, imports.find_upstream_modules(f"services.{service}", as_package=True))
    assert not missing, f"the extra [{service}] lacks what services.{service} imports"


@pytest.mark.parametrize("service", SERVICES)
def test_settings_need_no_extra(service: str, imports: grimp.ImportGraph) -> None:
    """Every process and the command itself read the settings of all services, by their modules' names."""
    missing = missing_of("", imports.find_upstream_modules(f"services.{service}.config"))
    assert not missing, f"services.{service}.config imports what an installation without extras lacks"


def missing_of(extra: str, reached: set[str]) -> dict[str, list[str]]:
    """Modules from outside among those reached that an extra does not install, and who provides them."""
    outside = {name for name in reached if "." not in name} - {"headrace", "services", "kernels", "bench"} - sys.stdlib_module_names
    installed = closure(extra)
    providers = importlib.metadata.packages_distributions()
    return {
        module: sorted({canonicalize_name(name) for name in providers.get(module, ["(not installed)"])})
        for module in outside
        if not {canonicalize_name(name) for name in providers.get(module, [])} & installed
    }


@pytest.mark.parametrize("extra", ["router", "tokenizer", "scheduler", "detokenizer", "models", "client"])
def test_only_the_worker_installs_torch(extra: str) -> None:
    assert not {"torch", "triton", "transformers"} & closure(extra)
    assert "torch" in closure("worker")


@pytest.mark.parametrize("extra", ["all", "dev"])
def test_the_lock_pins_all_that_an_extra_installs(extra: str) -> None:
    pins = locked()
    unpinned = closure(extra) - pins.keys() - {"setuptools"}
    assert not unpinned
    for name in sorted(closure(extra) & pins.keys()):
        installed = Version(importlib.metadata.version(name))
        assert installed.public == pins[name], f"{name} {installed} is installed, constraints.txt says {pins[name]}: make setup"


def test_the_lock_pins_nothing_that_no_extra_installs() -> None:
    assert not locked().keys() - closure("all") - closure("dev") - closure("") - {"setuptools"}


def test_the_lock_satisfies_every_declared_floor() -> None:
    pins = locked()
    declared = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, declared):
        if requirement.name == "headrace":
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
