"""Builds the native CPU library: `python kernels/cpu/build.py`, and the wheel's build hook.

One shared library with a C interface. It needs a C++ compiler and nothing else: no Python headers, no torch, no OpenMP. So one
build serves every Python and torch. The kernels are compiled once for each instruction set; which one runs is decided at run time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

LIBRARY: Final = "libheadrace_cpu.so"
COMPILE_TIMEOUT_S: Final = 600

_COMMON: Final = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-rtti", "-fno-exceptions", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-psabi", "-Wno-maybe-uninitialized",
)  # fmt: skip
_AVX512: Final = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512vnni",
    "-mfma",
    "-mf16c",
    "-mprefer-vector-width=512",
)
_X86_FLAGS: Final = {
    "isa_avx512_bf16.cc": (*_AVX512, "-mavx512bf16"),
    "isa_avx512.cc": _AVX512,
    "isa_avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
    # Never run where AVX2 is: small and quick to compile.
    "isa_generic.cc": ("-O2",),
}
_ARM_FLAGS: Final = {"isa_generic.cc": ("-march=armv8.2-a+dotprod",)}


class BuildError(Exception):
    """The library could not be built; the text says why."""


def find_compiler() -> str | None:
    """The C++ compiler: `CXX`, else g++ or clang++; None where there is none."""
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named)
    return shutil.which("g++") or shutil.which("clang++")


def build(directory: Path, compiler: str) -> Path:
    """Compile, unless the library is there and of these very sources, flags and compiler.

    Args:
        directory: `kernels/cpu`.
        compiler: Path of a C++ compiler.

    Returns:
        The library's path.

    Raises:
        BuildError: The compiler failed; the message is its own.
    """
    sources = directory / "src"
    target, stamp_file = directory / LIBRARY, directory / f"{LIBRARY}.stamp"
    if is_current(directory, compiler):
        return target
    flags = _flags_by_source(sources)
    stamp = _stamp(sources, flags, compiler)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
        objects = [Path(scratch) / f"{name}.o" for name in flags]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [
                [compiler, *_COMMON, *flags[name], "-c", str(sources / name), "-o", str(out)]
                for name, out in zip(flags, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        made = Path(scratch) / LIBRARY
        # The C++ runtime is linked in, so that the library runs where that is not installed.
        linking = ["-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--as-needed", "-pthread"]
        _run([compiler, *linking, *map(str, objects), "-o", str(made)])
        os.replace(made, target)
    stamp_file.write_text(stamp)
    return target


def is_current(directory: Path, compiler: str) -> bool:
    """Whether the library in `directory` (`kernels/cpu`) is there and of these very sources, flags and compiler."""
    target, stamp_file = directory / LIBRARY, directory / f"{LIBRARY}.stamp"
    if not target.is_file() or not stamp_file.is_file():
        return False
    sources = directory / "src"
    return stamp_file.read_text() == _stamp(sources, _flags_by_source(sources), compiler)


def _flags_by_source(sources: Path) -> dict[str, tuple[str, ...]]:
    return {source.name: _flags(source.name) for source in sorted(sources.glob("*.cc")) if _is_wanted(source.name)}


def _is_wanted(name: str) -> bool:
    return not name.startswith("isa_avx") or platform.machine() == "x86_64"


def _flags(name: str) -> tuple[str, ...]:
    if platform.machine() == "aarch64":
        return _ARM_FLAGS.get(name, ())
    return _X86_FLAGS.get(name, ())


def _stamp(sources: Path, flags: dict[str, tuple[str, ...]], compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    digest = hashlib.sha256(repr((flags, _COMMON, version, platform.machine())).encode())
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{' '.join(command)}\nwas not done within {COMPILE_TIMEOUT_S} s: stopped") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\nstopped with status {done.returncode}:\n{done.stderr.strip()}")


def main(arguments: list[str]) -> int:
    """Build; with `--where-possible` a missing compiler is told and is no failure."""
    directory = Path(__file__).resolve().parent
    compiler = find_compiler()
    if compiler is None:
        print(
            "kernels/cpu: no C++ compiler: the worker computes with torch, several times slower; install g++, or set CXX",
            file=sys.stderr,
        )
        return 0 if arguments == ["--where-possible"] else 1
    try:
        build(directory, compiler)
    except BuildError as failure:
        print(f"kernels/cpu: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
