"""The bytes behind every token id: what makes incremental decoding exact and cheap.

For the tokenizers of language models, decoding is joining: each token stands for some bytes, and the text is those bytes read as
UTF-8 (only the very beginning of a text has a rule of its own). This table holds the bytes of each token once, so that a stream
needs neither the tokenizer nor its own history. A tokenizer whose decoder works otherwise is refused at the start, by name;
docs/decisions/0003-incremental-decoding.md says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from headrace.errors import ModelError

_BYTE_TOKEN_LENGTH = 6


@dataclass(frozen=True, slots=True)
class StartRule:
    """What happens to the beginning of a text only.

    Attributes:
        num_stripped_spaces: Up to this many leading spaces are left out.
        dropped_marker: The first token loses each of these characters (SentencePiece's word marker); empty for no such rule.
    """

    num_stripped_spaces: int = 0
    dropped_marker: str = ""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Bytes and text of each token id.

    Attributes:
        pieces: Bytes by token id; empty for ids without a token, which decode to nothing.
        texts: The piece as text where it is whole characters; None where it is a part of one.
        special_ids: Tokens left out when special tokens are skipped.
        start_rule: What happens to the beginning of a text.
        first_pieces: Bytes of the tokens that differ at the beginning of a text.
    """

    pieces: list[bytes]
    texts: list[str | None]
    special_ids: frozenset[int]
    start_rule: StartRule
    first_pieces: Mapping[int, bytes]

    def without_special(self, keep: Set[str] = frozenset()) -> TokenTable:
        """Give the same table with special tokens standing for nothing, except those with a text to keep."""
        pieces, texts = list(self.pieces), list(self.texts)
        skipped = {token_id for token_id in self.special_ids if texts[token_id] not in keep}
        for token_id in skipped:
            pieces[token_id], texts[token_id] = b"", ""
        first = {token_id: piece for token_id, piece in self.first_pieces.items() if token_id not in skipped}
        return TokenTable(pieces, texts, self.special_ids, self.start_rule, first)

    @staticmethod
    def from_tokenizer(tokenizer: Tokenizer, *, model: str) -> TokenTable:
        """Tabulate a tokenizer.

        Args:
            tokenizer: A loaded tokenizer.json.
            model: Named in the error.

        Raises:
            ModelError: Its decoder does not join bytes.
        """
        decoder = json.loads(tokenizer.to_str())["decoder"]
        to_bytes, start_rule = _compile(decoder, model)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        first_pieces: dict[int, bytes] = {}
        for token, token_id in vocabulary.items():
            pieces[token_id] = to_bytes(token)
            if start_rule.dropped_marker and start_rule.dropped_marker in token:
                first_pieces[token_id] = to_bytes(token.replace(start_rule.dropped_marker, ""))
        special_ids = frozenset(id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        return TokenTable(pieces, [_whole_text(piece) for piece in pieces], special_ids, start_rule, first_pieces)


class TableChoice:
    """One tokenizer's table as it is and without special tokens, made once for each set of those that stay."""

    def __init__(self, table: TokenTable) -> None:
        self._whole = table
        self._without_special = {frozenset[str](): table.without_special()}

    def of(self, *, skip_special_tokens: bool, keep: frozenset[str]) -> TokenTable:
        """The table for a stream; `keep` are special tokens that a parser reads."""
        if not skip_special_tokens:
            return self._whole
        table = self._without_special.get(keep)
        if table is None:
            table = self._without_special[keep] = self._whole.without_special(keep)
        return table


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _compile(decoder: Mapping[str, Any] | None, model: str) -> tuple[Callable[[str], bytes], StartRule]:
    """Turn the decoder of a tokenizer.json into a function of one token, and the rule for the beginning of a text."""
    kind = "none" if decoder is None else decoder["type"]
    if decoder is not None and kind == "Sequence":
        return _compile_sequence(decoder["decoders"], model)
    if decoder is not None and kind in {"ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Replace"}:
        return _compile_sequence([decoder], model)
    raise _refused(model, kind)


def _compile_sequence(decoders: list[Mapping[str, Any]], model: str) -> tuple[Callable[[str], bytes], StartRule]:
    replacements: list[tuple[str, str]] = []
    has_byte_tokens = has_byte_level = is_fused = False
    start_rule = StartRule()
    for decoder in decoders:
        kind = decoder["type"]
        if kind == "Replace" and not is_fused and "String" in decoder["pattern"]:
            replacements.append((decoder["pattern"]["String"], decoder["content"]))
        elif kind == "ByteFallback" and not is_fused:
            has_byte_tokens = True
        elif kind == "Metaspace" and not is_fused:
            marker = decoder["replacement"]
            replacements.append((marker, " "))
            if decoder.get("prepend_scheme", "always") != "never":
                start_rule = StartRule(dropped_marker=marker)
        elif kind == "ByteLevel" and not is_fused and len(decoders) == 1:
            has_byte_level = True
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Strip" and is_fused and decoder["content"] == " " and decoder["stop"] == 0 and not start_rule.dropped_marker:
            start_rule = StartRule(num_stripped_spaces=decoder["start"])
        else:
            raise _refused(model, f"Sequence with {kind} as {json.dumps(decoder, ensure_ascii=False)}")
    if has_byte_level:
        return _byte_level_bytes, start_rule
    return lambda token: _replaced_bytes(token, replacements, has_byte_tokens), start_rule


def _replaced_bytes(token: str, replacements: list[tuple[str, str]], has_byte_tokens: bool) -> bytes:
    if has_byte_tokens and len(token) == _BYTE_TOKEN_LENGTH and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token.encode()
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        # An added token is written as itself; one character outside the alphabet makes all of it plain text.
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where it is printable, else the next from U+0100 on.

    Source: GPT-2 (Radford et al., 2019), as kept by every byte-level tokenizer.json since.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _refused(model: str, what: str) -> ModelError:
    return ModelError(
        f"model {model}: tokenizer.json has the decoder {what}, which cannot be streamed exactly; "
        "ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and a leading Strip can"
    )
