"""The build compiles the protos wherever it runs, says plainly why when it cannot, and its versions hold together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc_tools
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROTOS = sorted(path.stem for path in (ROOT / "proto" / "headrace" / "v1").glob("*.proto"))
GENERATED = {"__init__.py"} | {f"{name}{suffix}" for name in PROTOS for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")}
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.pyc", "v1", "results")


def load_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a clone holds, with no generated code."""
    tree = tmp_path / "tree"
    for folder in ("headrace", "services", "kernels", "bench", "docs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=NOT_SOURCE)
    shutil.copytree(ROOT / "proto", tree / "proto")
    names = ("pyproject.toml", "hatch_build.py", "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
    for name in (*names, "constraints.txt", ".gitignore"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def run(*command: str | Path, cwd: Path, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_sdist_carries_protos_and_its_wheel_built_in_isolation_carries_their_code(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    done = run("-m", "build", "--outdir", out, tree, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"proto/headrace/v1/{name}.proto" for name in PROTOS} | {"hatch_build.py", "constraints.txt", "LICENSE"} <= packed
    assert not [name for name in packed if name.startswith("headrace/v1/") or "_pb2" in name]

    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "headrace = headrace.cli.main:main" in archive.read(entry_points).decode()
    assert {name.removeprefix("headrace/v1/") for name in names if name.startswith("headrace/v1/")} == GENERATED
    assert {"headrace/py.typed", "services/router/__init__.py", "kernels/__init__.py", "bench/__init__.py"} <= names
    packages = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert packages <= {"headrace", "services", "kernels", "bench", "headrace_client"}


def test_a_broken_proto_ends_the_build_with_its_file_and_line_and_leaves_the_generated_code_as_it_was(tree: Path) -> None:
    assert run("hatch_build.py", cwd=tree).returncode == 0
    before = {path.name: path.read_bytes() for path in (tree / "headrace" / "v1").iterdir()}
    assert set(before) == GENERATED
    router = tree / "proto" / "headrace" / "v1" / "router.proto"
    lines = router.read_text().splitlines()
    lines[9] = "this is no proto"
    router.write_text("\n".join(lines))

    done = run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".", cwd=tree)

    assert done.returncode != 0
    assert "proto/headrace/v1/router.proto:10:1:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tree / "wheels").exists() or not list((tree / "wheels").iterdir())
    assert {path.name: path.read_bytes() for path in (tree / "headrace" / "v1").iterdir()} == before
    assert not list((tree / "headrace").glob(".proto-*"))


def test_a_dropped_proto_drops_its_code_and_unchanged_code_is_left_alone(tree: Path) -> None:
    hook = load_hook()
    assert set(hook.compile_protos(tree)) == GENERATED
    times = {path.name: path.stat().st_mtime_ns for path in (tree / "headrace" / "v1").iterdir()}
    (tree / "proto" / "headrace" / "v1" / "worker.proto").unlink()

    assert set(hook.compile_protos(tree)) == {"worker_pb2.py", "worker_pb2.pyi", "worker_pb2_grpc.py"}
    assert all(path.stat().st_mtime_ns == times[path.name] for path in (tree / "headrace" / "v1").iterdir())


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    hook = load_hook()
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    with pytest.raises(hook.ProtoError, match=r"compiler is missing\. Run: pip install 'grpcio-tools==1\."):
        hook.compile_protos(tree)
    assert not (tree / "headrace" / "v1").exists()


def test_another_compiler_than_the_pinned_one_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = load_hook()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    with pytest.raises(hook.ProtoError, match=r"grpcio-tools 1\.2\.3, not 1\."):
        hook.compile_protos(tree)


def test_a_tree_without_protos_is_refused(tree: Path) -> None:
    hook = load_hook()
    shutil.rmtree(tree / "proto")
    with pytest.raises(hook.ProtoError, match=r"no \.proto file under"):
        hook.compile_protos(tree)


def floor(name: str) -> Version:
    """The lowest version of a package that the base dependencies allow."""
    (requirement,) = [r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == name]
    (version,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return Version(version)


def constraints() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def test_compiler_generated_code_and_runtime_floors_agree() -> None:
    pin = Version(load_hook().compiler_pin(ROOT))
    assert f"grpcio-tools=={pin}" in PROJECT["project"]["optional-dependencies"]["dev"]
    assert constraints()["grpcio-tools"] == pin
    code = (ROOT / "headrace" / "v1" / "common_pb2.py").read_text()
    (demanded,) = re.findall(r"^# Protobuf Python Version: (\S+)$", code, flags=re.MULTILINE)
    assert floor("protobuf") == Version(demanded)
    stub = (ROOT / "headrace" / "v1" / "inference_pb2_grpc.py").read_text()
    (demanded,) = re.findall(r"^GRPC_GENERATED_VERSION = '(\S+)'$", stub, flags=re.MULTILINE)
    assert floor("grpcio") == Version(demanded)
    assert Path(grpc_tools.__file__).parent.joinpath("_proto").is_dir()


def test_generated_code_is_not_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "headrace/v1"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
