"""Grammars as workers match them: how one is compiled, within which limits, over which vocabulary.

The tokenizer tries a constraint out with these functions before anything is computed, the worker compiles what passed with the same
ones, so that what the one accepts the other does too. Everything here is bounded by the limits below; bounds of time and memory for
what a client sent are the tokenizer's (`services/tokenizer/constraints`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from headrace.errors import ModelError
from headrace.models.model_config import TOKENIZER_FILE

Vocabulary = LLTokenizer
"""The model's tokens as bytes, and as a trie; 64 MB for 49,152 tokens."""
Matcher = LLMatcher
"""A grammar and a place in it."""

_LIMITS: Final = LLParserLimits(
    # Symbols of all rules together: 400 properties with ten alternatives each. Compiling takes about 1 ms per 1,000.
    max_grammar_size=100_000,
    # Kinds of items in one place of the text.
    max_items_in_row=2000,
    # Work of one mask, about 7 ms and 1 ms at most; what needs more ends its request.
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    # About 1.5 kB each.
    max_lexer_states=50_000,
    verbose_errors=False,
)


class GrammarError(Exception):
    """A grammar that cannot be compiled; says why in words for the client."""


def load_vocabulary(directory: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Vocabulary:
    """Read a model's tokens.

    Args:
        directory: The model's.
        vocab_size: Logits a token has; ids without a token are never allowed.
        eos_token_ids: Tokens that end an output; allowed where a grammar may end.

    Raises:
        ModelError: The tokenizer is of a kind that grammars cannot be matched over.
    """
    try:
        content = (directory / TOKENIZER_FILE).read_text(encoding="utf-8")
        return LLTokenizer(content, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except Exception as error:
        raise ModelError(f"{directory / TOKENIZER_FILE}: grammars cannot be matched over this tokenizer: {error}") from error


def compile_grammar(vocabulary: Vocabulary, grammar: str) -> Matcher:
    """Compile a grammar; the matcher stands at its beginning. Lets go of the interpreter meanwhile.

    Raises:
        GrammarError: It is wrong, too large, or nothing matches it.
    """
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        # The first mask finds out what compiling put off.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(plain_reason(matcher.get_error()))
    return matcher


def plain_reason(message: str) -> str:
    """The reason in a matcher's error message, on one line."""
    return " ".join(message.replace("<non-verbose/>", "").split())
