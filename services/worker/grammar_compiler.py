"""Compiles the grammars of sequences that enter, on a thread of its own, and keeps them within bounds. Part of the shell.

A tokenizer has shown that a grammar compiles within its limits before a sequence comes here with it. The model's vocabulary, which
all grammars are compiled over, is read when the first one is wanted: many workers never see a constraint.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import ModelError
from headrace.telemetry import logs

if TYPE_CHECKING:
    from headrace.grammars import Matcher, Vocabulary
    from headrace.models.model_config import ModelConfig
    from services.worker.model_runner import ModelRunner

log = logs.get_logger()

_ENTRY_BYTES = 64 << 10
_BYTES_A_CHARACTER = 40
"""Of a compiled grammar, measured on schemas of 100 to 50,000 characters, with room."""


class GrammarCompiler:
    """Compiled grammars by their text; see `Grammars`.

    Args:
        directory: The model's.
        vocab_size: Logits a token has.
        eos_token_ids: Tokens that end an output.
        max_bytes: Of all grammars together, about; those used least lately are dropped first.
    """

    def __init__(self, directory: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...], max_bytes: int) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_bytes = max_bytes
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[bytes, tuple[Matcher | str, int]] = OrderedDict()
        self._num_bytes = 0
        self._under_way: set[bytes] = set()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @property
    def num_bytes(self) -> int:
        """Bytes held, about."""
        return self._num_bytes

    def want(self, grammar: str) -> None:
        """Have a grammar compiled, unless it is or is about to be; returns at once."""
        self.find(grammar)

    def find(self, grammar: str) -> Matcher | str | None:
        """A matcher at the beginning of a grammar; in words, why there is none; None while it is being compiled."""
        key = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found[0]
            if key not in self._under_way:
                self._under_way.add(key)
                self._executor.submit(self._compile, key, grammar)
            return None

    def stop(self) -> None:
        """Compile nothing more; what is being compiled is short."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, key: bytes, grammar: str) -> None:
        result: Matcher | str
        try:
            result = self._compiled_now(grammar)
        except ModelError as error:
            result = error.message
        except Exception as error:
            # Its sequences must not wait for ever.
            log.exception("grammar.failed")
            result = repr(error)
        size = _ENTRY_BYTES + _BYTES_A_CHARACTER * len(grammar)
        with self._lock:
            self._under_way.discard(key)
            self._compiled[key] = result, size
            self._num_bytes += size
            # The newest stays, whatever its size: somebody waits for it.
            while self._num_bytes > self._max_bytes and len(self._compiled) > 1:
                _, (_, oldest) = self._compiled.popitem(last=False)
                self._num_bytes -= oldest

    def _compiled_now(self, grammar: str) -> Matcher | str:
        from headrace.grammars import GrammarError, compile_grammar, load_vocabulary

        if self._vocabulary is None:
            self._vocabulary = load_vocabulary(self._directory, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
        try:
            return compile_grammar(self._vocabulary, grammar)
        except GrammarError as error:
            return str(error)


def constrain(runner: ModelRunner, config: ModelConfig, directory: Path, *, max_bytes: int) -> GrammarCompiler:
    """Have a runner's outputs follow their grammars; gives who compiles these."""
    # Stands on torch, which the mock runner does without.
    from services.worker.constraints.output_constraints import OutputConstraints

    vocab_size = runner.limits.vocab_size
    grammars = GrammarCompiler(directory, vocab_size=vocab_size, eos_token_ids=config.eos_token_ids, max_bytes=max_bytes)
    runner.constraints = OutputConstraints(grammars, vocab_size, likeliest_allowed=runner.likeliest_allowed)
    return grammars
