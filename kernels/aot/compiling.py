"""Compiles cases without a GPU: one at a time here, many in parallel processes of `python -m kernels.aot shard`.

Compiled code is kept in Triton's cache (`TRITON_CACHE_DIR`, by default ~/.triton/cache), keyed by the kernel's source and all that
it depends on: what has not changed is not compiled again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from kernels.aot.registry import RegisteredCase, all_cases
from kernels.aot.resources import Resources, problems, read

_SHARD_TIMEOUT_S: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one case. `resources` is None when it did not compile, and then `problems` says why."""

    key: str
    op: str
    resources: Resources | None
    problems: tuple[str, ...]
    compile_s: float


def compile_case(registered: RegisteredCase) -> Any:
    """Compile one case for its architecture; gives Triton's `CompiledKernel`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, architecture = registered.case, registered.architecture
    names = list(case.kernel.arg_names)
    if unknown := set(names) ^ (set(case.types) | set(case.constants)):
        raise LookupError(f"{registered.key}: argument {min(unknown)!r} is the kernel's or the case's, and not both")
    signature = {name: case.types.get(name, "constexpr") for name in names}
    # As a launch does it: arguments that the kernel itself takes as they come are never specialised.
    as_they_come = {each.name for each in case.kernel.params if each.do_not_specialize or each.do_not_specialize_on_alignment}
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in case.unaligned | as_they_come and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    ]
    source = ASTSource(case.kernel, signature, dict(case.constants), {(index,): [["tt.divisibility", 16]] for index in aligned})
    target = GPUTarget(architecture.backend, architecture.target, architecture.warp_size)
    return triton.compile(source, target=target, options=case.config.options())


def outcome_of(registered: RegisteredCase) -> Outcome:
    """Compile one case and judge it. Whatever the compiler raises is the case's problem, not ours."""
    start = time.monotonic()
    try:
        resources = read(compile_case(registered))
    except Exception as error:  # noqa: BLE001 (reported, and fails the run)
        why = f"{registered.key}: does not compile: {type(error).__name__}: {error}"
        return Outcome(registered.key, registered.op, None, (why,), time.monotonic() - start)
    found = tuple(problems(registered, resources))
    return Outcome(registered.key, registered.op, resources, found, time.monotonic() - start)


def compile_shard(index: int, num_shards: int, *, quick: bool, op: str | None = None) -> Iterable[Outcome]:
    """Compile every `num_shards`-th case from `index` on."""
    wanted = [each for each in all_cases() if (each.is_quick or not quick) and op in (None, each.op)]
    for registered in wanted[index::num_shards]:
        yield outcome_of(registered)


def compile_all(*, quick: bool, op: str | None = None, num_processes: int | None = None) -> dict[str, Outcome]:
    """Compile all cases, or the quick ones, or those of one op, in parallel processes, and give the outcomes by key.

    Raises:
        RuntimeError: A process failed.
    """
    num_shards = num_processes or os.cpu_count() or 1
    processes = [_start_shard(index, num_shards, quick=quick, op=op) for index in range(num_shards)]
    outcomes: list[Outcome] = []
    try:
        for process in processes:
            out, _ = process.communicate(timeout=_SHARD_TIMEOUT_S)
            if process.returncode != 0:
                raise RuntimeError(f"kernels.aot: a compiling process ended with status {process.returncode}")
            outcomes += [_from_json(line) for line in out.splitlines()]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)
    return {each.key: each for each in sorted(outcomes, key=lambda each: (each.op, each.key))}


def _start_shard(index: int, num_shards: int, *, quick: bool, op: str | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kernels.aot", "shard", str(index), str(num_shards)]
    command += ["--quick"] if quick else []
    command += ["--op", op] if op else []
    # A process whose kernels are interpreted compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def to_json(outcome: Outcome) -> str:
    """Write an outcome as one line, for the process that asked."""
    return json.dumps(asdict(outcome))


def _from_json(line: str) -> Outcome:
    fields = json.loads(line)
    resources = None if fields["resources"] is None else Resources(**fields["resources"])
    return Outcome(fields["key"], fields["op"], resources, tuple(fields["problems"]), fields["compile_s"])
