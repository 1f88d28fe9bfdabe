"""Barriers, which the interpreter cannot miss: it runs a program as one thread. They are looked for in the compiled code.

Method: kernels that read a state by some threads and write it by others are compiled, and in the code a barrier must stand between
the last read of memory and the last write. That this can fail is shown by cases that are compiled without their
`tl.debug_barrier()`. All in another process, as this one interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
import dataclasses, importlib.util, json, re, sys
from pathlib import Path
from kernels.aot.compiling import compile_case
from kernels.aot.registry import all_cases

op, folder = sys.argv[1:]
source = Path("kernels", op, "kernel.py").read_text()
path = Path(folder, "without_barrier.py")
path.write_text(re.sub(r"^ +tl.debug_barrier\\(\\)$", "", source, flags=re.MULTILINE))
spec = importlib.util.spec_from_file_location(path.stem, path)
without = importlib.util.module_from_spec(spec)
sys.modules[path.stem] = without
spec.loader.exec_module(without)


def is_guarded(registered):
    code = compile_case(registered).asm
    text, load, barrier, store = (
        (code["ptx"], "ld.global", "bar.sync", "st.global") if "ptx" in code else (code["amdgcn"], "_load_", "s_barrier", "_store_")
    )
    return 0 <= text.rfind(load) < text.rfind(barrier) < text.rfind(store)


guarded, unguarded = {}, {}
for registered in all_cases():
    if registered.op == op and registered.architecture.name in ("sm_90", "gfx942") and registered.is_quick:
        guarded[registered.key] = is_guarded(registered)
    if registered.op == op and registered.architecture.name in ("sm_90", "gfx942") and "width 2" in registered.case.label:
        case = dataclasses.replace(registered.case, kernel=getattr(without, registered.kernel_name))
        unguarded[registered.key] = is_guarded(dataclasses.replace(registered, case=case))
print(json.dumps([guarded, unguarded]))
"""


def compile_op(op: str, folder: Path) -> tuple[dict[str, bool], dict[str, bool]]:
    """Compile the quick cases as they are, and those of width 2 without a barrier; tells which are guarded."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, op, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=110, env=environment)
    guarded, unguarded = json.loads(done.stdout)
    return guarded, unguarded


def test_states_of_convolutions_are_written_after_a_barrier(tmp_path: Path) -> None:
    guarded, without = compile_op("causal_conv1d", tmp_path)
    assert {key.split(" | ")[0] for key in guarded} == {"causal_conv1d_prefill_kernel", "causal_conv1d_update_kernel"}
    assert all(guarded.values()), guarded
    assert len(without) == 4
    assert not any(is_guarded for key, is_guarded in without.items() if "update" in key), without


def test_states_of_state_spaces_are_written_after_a_barrier(tmp_path: Path) -> None:
    guarded, _ = compile_op("selective_state_update", tmp_path)
    assert guarded
    assert all(guarded.values()), guarded
