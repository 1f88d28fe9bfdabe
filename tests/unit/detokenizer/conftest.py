"""Small tokenizers of every supported kind, built here so that no test needs a download."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from services.detokenizer.token_table import TokenTable


def byte_level() -> Tokenizer:
    """All 256 bytes, some longer pieces (one of them ends inside a character), three added tokens of which two are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "he", "ll", "hell", "Ġw", "Ġwo", "ĠĠ", "æĹ", "¥æľ¬", "ðŁĺ"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", AddedToken("<|größe|>", special=True)])
    tokenizer.add_tokens(["<plain token>"])
    return tokenizer


def _sentencepiece_vocabulary(*, byte_tokens: bool) -> dict[str, int]:
    pieces = ["<unk>", "<s>", "</s>"]
    if byte_tokens:
        pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁▁", "▁he", "llo", "▁wor", "ld", "a", "b", "a▁b", "größe", "日", "本", "語", "😀", "."]
    return {piece: index for index, piece in enumerate(pieces)}


def metaspace(prepend_scheme: str = "always") -> Tokenizer:
    """SentencePiece's marker, dropped from the first token unless the scheme is "never"."""
    tokenizer = Tokenizer(models.BPE(vocab=_sentencepiece_vocabulary(byte_tokens=False), merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def llama_like() -> Tokenizer:
    """Byte fallback and one leading space stripped, as in Llama 2."""
    vocabulary = _sentencepiece_vocabulary(byte_tokens=True)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def unsupported() -> Tokenizer:
    """A decoder that looks at what comes next."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("a+"), " "), decoders.Fuse()])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, Tokenizer]:
    """One tokenizer of every supported kind, by name."""
    return {
        "byte_level": byte_level(),
        "metaspace": metaspace(),
        "metaspace_never": metaspace("never"),
        "llama_like": llama_like(),
    }


@pytest.fixture(scope="session")
def tables_by_kind(tokenizers_by_kind: dict[str, Tokenizer]) -> dict[str, TokenTable]:
    """The table of each, special tokens kept."""
    return {kind: TokenTable.from_tokenizer(tokenizer, model=kind) for kind, tokenizer in tokenizers_by_kind.items()}


@pytest.fixture(scope="session")
def unsupported_tokenizer() -> Tokenizer:
    """One whose decoder cannot be streamed."""
    return unsupported()
