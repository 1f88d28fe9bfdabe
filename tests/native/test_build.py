"""Goal: no run of the tests passes because the native library was left out, or is of other sources."""

from __future__ import annotations

from kernels.cpu.build import find_compiler, is_current
from kernels.cpu.library import ISA_NAMES, LIBRARY_FILE


def test_library_is_built_of_these_sources_wherever_a_compiler_is() -> None:
    compiler = find_compiler()
    if compiler is None:
        assert not LIBRARY_FILE.with_name("src").joinpath("missing").exists()
        return
    assert LIBRARY_FILE.is_file(), "the native library is not built, and a C++ compiler is there: run make setup"
    assert is_current(LIBRARY_FILE.parent, compiler), "the native library is of other sources: run make setup"


def test_no_instruction_set_goes_untested(isa: int) -> None:
    assert ISA_NAMES[isa]
