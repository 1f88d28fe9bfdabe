"""Goal: no run of the tests passes because the native library was left out, or is of other sources; what stops a build is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.cpu import build
from kernels.cpu.build import find_compiler, is_current
from kernels.cpu.library import ISA_NAMES, LIBRARY_FILE


def test_library_is_built_of_these_sources_wherever_a_compiler_is() -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler to build it with")
    assert LIBRARY_FILE.is_file(), "the native library is not built, and a C++ compiler is there: run make setup"
    assert is_current(LIBRARY_FILE.parent, compiler), "the native library is of other sources: run make setup"


def test_no_instruction_set_goes_untested(isa: int) -> None:
    assert ISA_NAMES[isa]


@pytest.mark.parametrize(("does", "told"), [("echo no room >&2; exit 3", "no room"), ("exec sleep 3600", "was not done within")])
def test_a_compiler_that_fails_or_never_ends_is_told_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, told: str
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "program.cc").touch()
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\nif [ $1 = --version ]; then echo one; exit 0; fi\n{does}\n")
    compiler.chmod(0o755)
    if "sleep" in does:
        monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.1)
    with pytest.raises(build.BuildError, match=rf"(?s){compiler}.*program.cc.*{told}"):
        build.build(tmp_path, str(compiler))
    assert not (tmp_path / build.LIBRARY).exists()
