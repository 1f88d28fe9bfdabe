"""Every kernel compiles for every architecture, within its limits, and RESOURCES.md says what it takes.

`make test` compiles the quick subset (hot kernels on sm_90, the first case of each kernel everywhere); `make kernels-report` all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.aot import registry
from kernels.aot.compiling import Outcome, compile_all
from kernels.aot.report import read_page

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return compile_all(quick=True)


@pytest.mark.timeout(240)
def test_the_quick_cases_compile_within_their_limits(outcomes: dict[str, Outcome]) -> None:
    assert outcomes
    assert not [problem for outcome in outcomes.values() for problem in outcome.problems]


def test_the_page_says_what_was_compiled(outcomes: dict[str, Outcome]) -> None:
    page = read_page()
    stale = [key for key, outcome in outcomes.items() if page.get(key) != outcome.resources]
    assert not stale, "run make kernels-report"


def test_the_page_lists_every_case_and_no_other() -> None:
    assert read_page().keys() == {each.key for each in registry.all_cases()}


def test_no_hot_kernel_spills_by_the_page() -> None:
    page = read_page()
    spilling = [each.key for each in registry.all_cases() if each.case.is_hot and page[each.key].spilled_bytes]
    assert not spilling


def test_every_op_has_its_files_its_tests_and_its_roofline() -> None:
    assert {"rms_norm"} <= set(registry.op_names())
    assert {op for op, _ in registry.all_workloads()} == set(registry.op_names())
    for op in registry.op_names():
        for name in ("__init__.py", "reference.py", "launch.py", "compile_cases.py", "README.md"):
            assert (registry.KERNELS / op / name).is_file(), f"kernels/{op} lacks {name}"
        assert (TESTS / f"test_{op}.py").is_file(), f"tests/kernels lacks test_{op}.py"
