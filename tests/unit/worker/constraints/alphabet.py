"""A vocabulary of a hundred tokens for tests: printable ASCII from token 0 on, then tokens without text, and the end at 99."""

from __future__ import annotations

import json

from llguidance import LLTokenizer, TokenizerWrapper

from headrace.grammars import GrammarError, Matcher, compile_grammar

EOS = 99


class _Alphabet:
    eos_token_id = EOS
    bos_token_id = None
    tokens = tuple(bytes([32 + index]) for index in range(95)) + tuple(f"<{index}>".encode() for index in range(95, 100))
    special_token_ids = (95, 96, 97, 98, 99)

    def __call__(self, text: bytes) -> list[int]:
        return [byte - 32 for byte in text]


def ids(text: str) -> list[int]:
    """The tokens of a text."""
    return [ord(character) - 32 for character in text]


def regex(pattern: str) -> str:
    """A grammar as workers get it."""
    return json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern}/"}]})


class AlphabetGrammars:
    """Grammars over this vocabulary, compiled when asked for; those named in `late` are not there yet."""

    def __init__(self) -> None:
        self.vocabulary = LLTokenizer(TokenizerWrapper(_Alphabet()), n_vocab=100)
        self.late: set[str] = set()

    def find(self, grammar: str) -> Matcher | str | None:
        if grammar in self.late:
            return None
        try:
            return compile_grammar(self.vocabulary, grammar)
        except GrammarError as error:
            return str(error)
