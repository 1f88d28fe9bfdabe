"""The compiling child: it answers, it is killed when it must be, and it is started again."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.errors import InvalidRequestError, ModelError
from services.tokenizer.constraints.compiler import CompileLimits, ConstraintCompiler
from tests.patience import WAIT_S

LARGE = json.dumps([f"choice {index} of very many" for index in range(4000)])


@pytest.fixture
def make(model_directory: Path) -> Iterator[Callable[..., ConstraintCompiler]]:
    """Makes compilers and ends their children."""
    made = []

    def make_one(timeout_s: float = WAIT_S, memory_bytes: int = 1 << 30) -> ConstraintCompiler:
        limits = CompileLimits(timeout_s, memory_bytes)
        made.append(ConstraintCompiler(model_directory, vocab_size=260, eos_token_ids=(257,), limits=limits))
        return made[-1]

    yield make_one
    for compiler in made:
        compiler.close()


def test_it_is_started_when_first_asked_and_goes_on_after_errors(make: Callable[..., ConstraintCompiler]) -> None:
    compiler = make()
    assert compiler.pid is None
    assert "start" in compiler.compile("regex", "a+", param="guided_regex")
    first = compiler.pid
    with pytest.raises(InvalidRequestError, match="guided_regex: the regular expression") as refused:
        compiler.compile("regex", "(", param="guided_regex")
    assert refused.value.param == "guided_regex"
    assert compiler.compile("json_object", "", param="response_format")
    assert compiler.pid == first


def test_what_takes_too_long_is_stopped_and_the_next_one_is_served(make: Callable[..., ConstraintCompiler]) -> None:
    compiler = make()
    assert compiler.compile("regex", "a+", param="p")
    first = compiler.pid
    compiler._limits = CompileLimits(1e-4, 1 << 30)
    with pytest.raises(InvalidRequestError, match="took longer than"):
        compiler.compile("choice", LARGE, param="p")
    assert not Path(f"/proc/{first}").exists()
    compiler._limits = CompileLimits(WAIT_S, 1 << 30)
    assert compiler.compile("regex", "a+", param="p")


def test_a_child_that_has_too_little_memory_is_a_refusal(make: Callable[..., ConstraintCompiler]) -> None:
    compiler = make()
    assert compiler.compile("regex", "a+", param="p")
    pid = compiler.pid
    assert pid is not None
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used, used))
    with pytest.raises(InvalidRequestError, match=r"its memory limit is|took too much memory"):
        compiler.compile("choice", LARGE, param="p")
    assert compiler.compile("regex", "a+", param="p"), "the next one is served"


def test_a_tokenizer_without_grammars_is_told(make: Callable[..., ConstraintCompiler], model_directory: Path) -> None:
    (model_directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="tokenizer"):
        make().compile("regex", "a+", param="p")
