"""What the linters cannot say: sizes that may only fall, waits without a limit, names and words that are not ours."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("headrace", "services", "kernels", "bench", "tools", "hatch_build.py")

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
KERNEL_LINES_MAX = 120
CLASS_METHODS_MAX = 15
CLASS_ATTRIBUTES_MAX = 20

VOCABULARY_METHODS_MAX = 40

RATCHET: dict[str, int] = {
    "headrace/supervision/supervisor.py::Supervisor": 17,
    "services/detokenizer/service.py::DetokenizerService": 28,
    "services/detokenizer/streams.py::StreamTable": 17,
    "services/scheduler/scheduler.py::Scheduler": 19,
    "services/scheduler/service.py::SchedulerService": 16,
    "services/tokenizer/service.py::TokenizerService": 23,
    "services/worker/batch_inputs.py::BatchInputs": 20,
    "services/worker/service.py::WorkerService": 22,
}
"""What is over a limit today, as "path" or "path::name" -> its size. An entry may only shrink, and goes when it fits."""

FORBIDDEN_FILE_NAMES = {"utils.py", "common.py", "helpers.py", "manager.py", "base.py", "misc.py"}

MACHINE_PATHS = ("/" + "work/", "/opt/" + "wheels", "/opt/" + "pypi", "/root/" + ".cache")
"""Spelled in halves, so that this file passes its own test."""

UNBOUNDED_WITHOUT_TIMEOUT = {
    "urlopen", "socket.create_connection", "ClientSession", "HTTPConnection", "HTTPSConnection",
    "subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "communicate",
}  # fmt: skip
"""Calls that wait on a network or another process for ever unless told how long."""


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources() -> list[Path]:
    """Our Python, without tests and generated code."""
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in CODE]


def walk(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield every function and class below a node with its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{child.name}"
            yield name, child
            yield from walk(child, f"{name}.")
        else:
            yield from walk(child, prefix)


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def attributes(node: ast.ClassDef) -> set[str]:
    """Names assigned on `self` anywhere in a class."""
    found = set()
    for part in ast.walk(node):
        targets = part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        found |= {
            t.attr for t in targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
        }
    return found


def sizes() -> dict[str, tuple[int, int, str]]:
    """Every measured thing: its key -> (size, limit, what is counted)."""
    found: dict[str, tuple[int, int, str]] = {}
    for path in sources():
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        found[name] = (text.count("\n"), FILE_LINES_MAX, "lines")
        for inner, node in walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
                ours = [each for each in methods if not (each.name.startswith("__") and each.name.endswith("__"))]
                # Operations of a network are a vocabulary: one method each, and no state to lose sight of.
                is_vocabulary = node.name.endswith("Ops")
                found[f"{name}::{inner}"] = (len(ours), VOCABULARY_METHODS_MAX if is_vocabulary else CLASS_METHODS_MAX, "methods")
                found[f"{name}::{inner}.self"] = (len(attributes(node)), CLASS_ATTRIBUTES_MAX, "attributes")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = KERNEL_LINES_MAX if path.name == "kernel.py" else FUNCTION_LINES_MAX
                found[f"{name}::{inner}"] = (num_lines(node), limit, "lines")
    return found


def test_nothing_grows_past_its_size_limit() -> None:
    too_big = [
        f"{key}: {size} {unit}, limit {max(limit, RATCHET.get(key, 0))}"
        for key, (size, limit, unit) in sizes().items()
        if size > max(limit, RATCHET.get(key, 0))
    ]
    assert not too_big


def test_the_ratchet_holds_nothing_that_fits_by_now() -> None:
    measured = sizes()
    loose = [key for key in RATCHET if key not in measured or measured[key][0] <= measured[key][1]]
    assert not loose, "drop these entries of RATCHET"


def test_no_file_is_named_for_having_no_subject() -> None:
    named = [path for path in sources() if path.name in FORBIDDEN_FILE_NAMES or path.stem.endswith("_utils")]
    assert not named


def test_no_class_is_a_mixin() -> None:
    mixins = [
        f"{path.relative_to(ROOT)}::{name}"
        for path in sources()
        for name, node in walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.lower().endswith("mixin")
    ]
    assert not mixins


def test_every_file_begins_with_a_docstring_and_every_package_init_is_empty() -> None:
    for path in sources():
        text = path.read_text()
        if path.name == "__init__.py":
            assert text == "", f"{path.relative_to(ROOT)}: names are imported from where they are defined"
        else:
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"


def call_name(node: ast.Call) -> set[str]:
    """The last name of what is called, alone and with its owner: {"run", "subprocess.run"}."""
    if isinstance(node.func, ast.Name):
        return {node.func.id}
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        return {node.func.attr, f"{owner}.{node.func.attr}"}
    return set()


def test_every_wait_on_a_network_or_a_process_has_a_limit() -> None:
    unbounded = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and call_name(node) & UNBOUNDED_WITHOUT_TIMEOUT
        and not any(keyword.arg in ("timeout", None) for keyword in node.keywords)
    ]
    assert not unbounded, "pass timeout="


def test_nothing_is_left_for_later() -> None:
    raising = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]
    assert not raising


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    naming = []
    for path in tracked():
        data = path.read_bytes()
        naming += [f"{path.relative_to(ROOT)}: {word}" for word in MACHINE_PATHS if word.encode() in data]
    assert not naming


def test_the_kernels_package_is_ours_and_empty() -> None:
    """transformers probes for a Hugging Face package of the same name and would take ours for it by a version."""
    assert (ROOT / "kernels" / "__init__.py").read_bytes() == b""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def test_the_proto_folder_holds_no_python() -> None:
    assert not list((ROOT / "proto").rglob("*.py"))
