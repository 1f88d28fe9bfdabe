"""The build hook: compiles proto/headrace/v1/*.proto into headrace/v1, and kernels/cpu/src into a library beside it, whenever a
wheel or an editable install is built.

It is the only place that runs the protobuf compiler. `python hatch_build.py` (that is, `make proto`) does the same by hand.
What it writes is ignored by git, carried by the wheel, and left out of the sdist, whose wheel is built by this same hook.

The native library needs a C++ compiler. Without one the build goes on, and the worker computes with torch; HEADRACE_NATIVE=require
makes that an error, HEADRACE_NATIVE=off builds none.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("headrace", "v1")
COMPILER = "grpcio-tools"
COMPILE_TIMEOUT_S = 120


NATIVE = Path("kernels", "cpu")
NATIVE_VARIABLE = "HEADRACE_NATIVE"


class ProtoError(Exception):
    """The protos could not be compiled; the text says what to do."""


class NativeError(Exception):
    """The native library was asked for and could not be built; the text says what to do."""


def compiler_pin(root: Path) -> str:
    """Return the compiler's version as pinned under `[build-system] requires` of pyproject.toml."""
    with (root / "pyproject.toml").open("rb") as file:
        requires: list[str] = tomllib.load(file)["build-system"]["requires"]
    for requirement in requires:
        name, _, version = requirement.partition("==")
        if name == COMPILER and version:
            return version
    raise ProtoError(f"pyproject.toml: [build-system] requires must pin the compiler as '{COMPILER}==<version>'.")


def check_compiler(pin: str) -> None:
    """Refuse a missing compiler, and any but the pinned one: generated code demands a runtime at least as new as its compiler."""
    try:
        found = importlib.metadata.version(COMPILER)
    except importlib.metadata.PackageNotFoundError:
        raise ProtoError(f"the protobuf compiler is missing. Run: pip install '{COMPILER}=={pin}'") from None
    if found != pin:
        raise ProtoError(f"the protobuf compiler is {COMPILER} {found}, not {pin}. Run: pip install '{COMPILER}=={pin}'")


def run_compiler(root: Path, sources: list[Path], out: Path) -> None:
    """Run protoc over `sources` into `out`, and raise its own messages, by file and line, when it refuses."""
    import grpc_tools

    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    command += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    command += [source.relative_to(root).as_posix() for source in sources]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise ProtoError(f"the protobuf compiler stopped with status {done.returncode}:\n{done.stderr.rstrip()}")


def install_files(made: Path, target: Path) -> list[str]:
    """Move what changed from `made` into `target`, drop what is there no more, and return the names that were written or dropped.

    Each file is replaced whole, so a process that imports the package meanwhile never reads half a file.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in made.iterdir()}
    changed = []
    for stale in target.iterdir():
        if stale.is_file() and stale.name not in names:
            stale.unlink()
            changed.append(stale.name)
    for name in sorted(names):
        if not (target / name).is_file() or (target / name).read_bytes() != (made / name).read_bytes():
            os.replace(made / name, target / name)
            changed.append(name)
    return changed


def compile_protos(root: Path) -> list[str]:
    """Compile every proto of the package; all or nothing.

    Args:
        root: The project directory, which holds pyproject.toml and proto/.

    Returns:
        The names of the generated files that changed.

    Raises:
        ProtoError: No proto, no compiler, another compiler than the pinned one, or a proto that does not compile.
    """
    sources = sorted((root / "proto" / PACKAGE).glob("*.proto"))
    if not sources:
        raise ProtoError(f"no .proto file under {root / 'proto' / PACKAGE}.")
    check_compiler(compiler_pin(root))
    # Beside the target, so that each replace stays on one file system.
    with tempfile.TemporaryDirectory(prefix=".proto-", dir=root / PACKAGE.parent) as scratch:
        run_compiler(root, sources, Path(scratch))
        made = Path(scratch) / PACKAGE
        (made / "__init__.py").write_text('"""Messages and gRPC stubs, generated from proto/headrace/v1 by the build."""\n')
        return install_files(made, root / PACKAGE)


def build_native(root: Path) -> str | None:
    """Build the native CPU library in its place.

    Args:
        root: The project directory.

    Returns:
        None, or why there is none.

    Raises:
        NativeError: It does not compile, or is required and there is no compiler, or the variable has another value.
    """
    wanted = os.environ.get(NATIVE_VARIABLE, "auto")
    if wanted not in ("auto", "require", "off"):
        raise NativeError(f"{NATIVE_VARIABLE} is {wanted!r}; it is auto, require or off")
    if wanted == "off":
        return f"{NATIVE_VARIABLE} is off"
    spec = importlib.util.spec_from_file_location("headrace_native_build", root / NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    compiler = build.find_compiler()
    if compiler is None:
        if wanted == "require":
            raise NativeError("no C++ compiler for the native CPU kernels: install g++, or set CXX")
        return "no C++ compiler (g++, or the one that CXX names)"
    try:
        build.build(root / NATIVE, compiler)
    except build.BuildError as error:
        raise NativeError(f"the native CPU kernels do not compile; {NATIVE_VARIABLE}=off builds without them.\n{error}") from error
    return None


class ProtoBuildHook(BuildHookInterface[Any]):
    """Hatchling's door to `compile_protos`; registered for wheels, editable ones included."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before files are collected; what does not compile ends the build with the compiler's message and status 1."""
        try:
            compile_protos(Path(self.root))
            missing = build_native(Path(self.root))
        except (ProtoError, NativeError) as error:
            self.app.abort(f"headrace: {error}")
            return
        if missing is None:
            # The library is of this machine's kind, and of any Python.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
        else:
            self.app.display_warning(f"headrace: built without native CPU kernels: {missing}. The worker will compute with torch.")


if __name__ == "__main__":
    try:
        changed_names = compile_protos(Path(__file__).resolve().parent)
    except ProtoError as failure:
        sys.exit(f"headrace: {failure}")
    print(f"proto: {len(changed_names)} generated files changed under {PACKAGE}/")
