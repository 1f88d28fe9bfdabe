"""The thread that compiles grammars, and what it keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.worker.grammar_compiler import GrammarCompiler
from tests.unit.worker.constraints.alphabet import regex


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def compiler(directory: Path) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(directory, vocab_size=257, eos_token_ids=(256,), max_bytes=300_000)
    yield made
    made.stop()


def wait_for(compiler: GrammarCompiler, grammar: str) -> object:
    while (found := compiler.find(grammar)) is None:
        time.sleep(0.002)
    return found


def test_a_grammar_is_compiled_beside_its_caller_and_kept(compiler: GrammarCompiler) -> None:
    assert compiler.find(regex("a+")) is None
    first = wait_for(compiler, regex("a+"))
    assert not isinstance(first, str)
    assert compiler.find(regex("a+")) is first


def test_what_is_wrong_is_told_in_words(compiler: GrammarCompiler) -> None:
    assert "unclosed" in str(wait_for(compiler, regex("(")))


def test_the_bytes_are_bounded(compiler: GrammarCompiler) -> None:
    for index in range(8):
        wait_for(compiler, regex(f"a{index}"))
        assert compiler.num_bytes <= 300_000
    assert compiler.find(regex("a7")) is not None
    assert compiler.find(regex("a0")) is None, "dropped, and about to be compiled again"
    assert wait_for(compiler, regex("a0"))


def test_a_tokenizer_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    compiler = GrammarCompiler(tmp_path, vocab_size=257, eos_token_ids=(), max_bytes=1000)
    assert "grammars cannot be matched over this tokenizer" in str(wait_for(compiler, regex("a")))
    compiler.stop()
