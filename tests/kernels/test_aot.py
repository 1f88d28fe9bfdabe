"""Every kernel compiles for every architecture, within its limits, and RESOURCES.md says what it takes.

`make test` compiles the quick subset (hot kernels on sm_90, the first case of each kernel everywhere); `make kernels-report` all.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.aot import fingerprint, registry
from kernels.aot.compiling import Outcome, compile_all
from kernels.aot.fingerprint import fingerprints
from kernels.aot.report import read_page
from kernels.launching import LaunchConfig
from kernels.triton_versions import TRIED

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return compile_all(quick=True)


def test_the_quick_cases_compile_within_their_limits(outcomes: dict[str, Outcome]) -> None:
    assert outcomes
    assert not [problem for outcome in outcomes.values() for problem in outcome.problems]


def test_the_page_says_what_was_compiled(outcomes: dict[str, Outcome]) -> None:
    page = read_page().resources
    stale = [key for key, outcome in outcomes.items() if page.get(key) != outcome.resources]
    assert not stale, "run make kernels-report"


def test_the_page_is_of_todays_kernels_and_lists_every_case() -> None:
    """So a change of any kernel makes someone compile all of its cases, and not only those above."""
    page = read_page()
    assert page.triton == importlib.metadata.version("triton") == TRIED[0], "run make kernels-report"
    assert page.fingerprints == fingerprints(registry.all_cases()), "run make kernels-report"
    assert page.resources.keys() == {each.key for each in registry.all_cases()}


def test_a_fingerprint_is_of_what_is_compiled_and_not_of_its_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: a copy of the kernels' files, one of which is changed in a comment, then in a helper that two kernels import."""
    for path in registry.KERNELS.rglob("*.py"):
        copy = tmp_path / path.relative_to(registry.KERNELS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    cases, before = list(registry.all_cases()), fingerprints(registry.all_cases())
    monkeypatch.setattr(fingerprint, "KERNELS", tmp_path)
    helper = tmp_path / "online_softmax.py"
    helper.write_text(helper.read_text().replace("# A query that has", "# No query that has"))
    assert fingerprints(cases) == before
    fingerprint._source_of.cache_clear()
    helper.write_text(helper.read_text().replace("tl.exp2(maximum - reference)", "tl.exp2(maximum)"))
    changed = {row.split("_kernel")[0] for row, digest in fingerprints(cases).items() if digest != before[row]}
    assert changed == {"extend_attention", "paged_decode_attention_split", "paged_decode_attention_reduce"}
    config = replace(cases[0].case, config=LaunchConfig(num_warps=2))
    assert fingerprints([replace(cases[0], case=config)]) != fingerprints(cases[:1])


def test_no_hot_kernel_spills_by_the_page() -> None:
    page = read_page().resources
    spilling = [each.key for each in registry.all_cases() if each.case.is_hot and page[each.key].spilled_bytes]
    assert not spilling


def test_every_op_has_its_files_its_tests_and_its_roofline() -> None:
    assert {"rms_norm"} <= set(registry.op_names())
    assert {op for op, _ in registry.all_workloads()} == set(registry.op_names())
    for op in registry.op_names():
        for name in ("__init__.py", "reference.py", "launch.py", "compile_cases.py", "README.md"):
            assert (registry.KERNELS / op / name).is_file(), f"kernels/{op} lacks {name}"
        assert (TESTS / f"test_{op}.py").is_file(), f"tests/kernels lacks test_{op}.py"
