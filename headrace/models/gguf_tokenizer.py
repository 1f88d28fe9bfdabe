"""Rebuild tokenizer.json from the vocabulary inside a GGUF file.

Two kinds of tokenizer are known: byte-level BPE (`gpt2`), whose merges are in the file and whose way of cutting text into words is
named by `tokenizer.ggml.pre`; and SentencePiece BPE (`llama`), whose merges are found from the scores of its pieces. A way of
cutting that is not in the table here is an error: guessing would give a model slightly wrong tokens, which nothing would notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from headrace.errors import ModelError
from headrace.models.gguf_file import GgufFile, GgufValue

_Item = TypeVar("_Item", str, int, float)

_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

_ROLES: Final[Mapping[str, str]] = {
    "bos_token": "bos",
    "eos_token": "eos",
    "eot_token": "eot",
    "unk_token": "unknown",
    "pad_token": "padding",
}
"""Roles of special tokens, and how GGUF's keys call them."""

_SPACE_PIECE: Final = "\u2581"

# How words are cut before merging. The patterns state published tokenizers' rules and must match them character for character.
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_CASED_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
# Words by case: capitals first, then small letters, at least one of the one or the other.
_CASED_WORD_1: Final = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CASED_WORD_2: Final = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_LLAMA3_WORDS: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_LETTERS_REST}"
_QWEN2_WORDS: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_LETTERS_REST}"
_GPT4O_WORDS: Final = rf"{_CASED_WORD_1}{_CONTRACTIONS}?|{_CASED_WORD_2}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}"
_TEKKEN_WORDS: Final = rf"{_CASED_WORD_1}|{_CASED_WORD_2}|\p{{N}}|{_CASED_REST}"
_GPT2_NAMES: Final = ("gpt-2",)
_SINGLE_DIGIT_NAMES: Final = ("smollm", "starcoder", "refact")
_PATTERNS: Final[Mapping[str, str]] = {
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "smaug-bpe": _LLAMA3_WORDS,
    "dbrx": _LLAMA3_WORDS,
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "gpt-4o": _GPT4O_WORDS,
    "tekken": _TEKKEN_WORDS,
}
# Tokenizers that take a word which is in the vocabulary whole, even where merges would not lead to it.
_WHOLE_WORD_NAMES: Final = ("llama-bpe", "llama3", "llama-v3", "tekken")
# Tokenizers that compose characters first.
_COMPOSING_NAMES: Final = ("qwen2",)

_TURN_ENDS: Final = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Tokens that end an answer in a chat, whatever the file calls its end token."""

_PHI3_PLAIN_TOKENS: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3's SentencePiece vocabulary that leave the space after them; all others take it in."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The tokenizer keys of a GGUF file, checked.

    Attributes:
        model: `gpt2` or `llama`.
        pieces: Text of each token, by id.
        kinds: GGUF's token kind of each token, by id.
        special_ids: Ids by role, such as `{"bos_token": 1}`.
        end_ids: Ids that end an answer, the end token first.
        adds_bos: A prompt starts with the beginning-of-text token.
    """

    model: str
    pieces: list[str]
    kinds: list[int]
    special_ids: dict[str, int]
    end_ids: list[int]
    adds_bos: bool
    adds_eos: bool
    metadata: Mapping[str, GgufValue]

    def special_texts(self) -> dict[str, str]:
        """Give special tokens by role, as text, as tokenizer_config.json names them."""
        return {role: self.pieces[token_id] for role, token_id in self.special_ids.items()}


def read_vocabulary(file: GgufFile) -> GgufVocabulary:
    """Read and check the tokenizer keys.

    Raises:
        ModelError: The file has no tokenizer, one of another kind, or lists that do not fit together.
    """
    metadata = file.metadata
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ModelError(f"{file.path}: tokenizer {model!r} is not supported; 'gpt2' (BPE) and 'llama' (SentencePiece) are")
    pieces = _list_of(file, "tokenizer.ggml.tokens", str)
    kinds = _list_of(file, "tokenizer.ggml.token_type", int) if "tokenizer.ggml.token_type" in metadata else [_NORMAL] * len(pieces)
    if len(kinds) != len(pieces):
        raise ModelError(f"{file.path}: {len(pieces)} tokens but {len(kinds)} token types; pull the model again")
    if len(set(pieces)) != len(pieces):
        raise ModelError(f"{file.path}: its vocabulary has a token twice; pull the model again")
    special_ids = _special_ids(file, len(pieces))
    return GgufVocabulary(
        model=str(model),
        pieces=pieces,
        kinds=kinds,
        special_ids={role: token_id for role, token_id in special_ids.items() if role != "eot_token"},
        end_ids=_end_ids(pieces, kinds, special_ids),
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", model == "llama")),
        adds_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        metadata=metadata,
    )


def build_tokenizer(file: GgufFile, vocabulary: GgufVocabulary) -> Tokenizer:
    """Build the tokenizer that gives the same ids as the one the model was trained with.

    Raises:
        ModelError: A way of cutting words that is not known here, or merges that do not fit the vocabulary.
    """
    tokenizer = _byte_level_bpe(file, vocabulary) if vocabulary.model == "gpt2" else _sentencepiece_bpe(file, vocabulary)
    takes_space = vocabulary.model == "llama" and file.metadata.get("general.architecture") == "phi3"
    plain = _PHI3_PLAIN_TOKENS if takes_space else vocabulary.pieces
    pairs = list(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
    tokenizer.add_special_tokens(
        [_added(piece, special=True, rstrip=piece not in plain) for piece, kind in pairs if kind in (_CONTROL, _UNKNOWN)]
    )
    tokenizer.add_tokens(
        [_added(piece, special=False, rstrip=piece not in plain) for piece, kind in pairs if kind == _USER_DEFINED]
    )
    _add_post_processor(tokenizer, vocabulary)
    return tokenizer


def _added(piece: str, *, special: bool, rstrip: bool) -> AddedToken:
    return AddedToken(piece, single_word=False, lstrip=False, rstrip=rstrip, normalized=False, special=special)


def _byte_level_bpe(file: GgufFile, vocabulary: GgufVocabulary) -> Tokenizer:
    merges: list[tuple[str, str]] = []
    for line in _list_of(file, "tokenizer.ggml.merges", str):
        # A piece never starts with a plain space, so the separator is the first space after the first character.
        cut = line.find(" ", 1)
        if cut < 0:
            raise ModelError(f"{file.path}: merge {line!r} is not a pair; pull the model again")
        merges.append((line[:cut], line[cut + 1 :]))
    cutting = str(vocabulary.metadata.get("tokenizer.ggml.pre"))
    vocab = {piece: token_id for token_id, piece in enumerate(vocabulary.pieces)}
    tokenizer = Tokenizer(_bpe(file, vocab=vocab, merges=merges, ignore_merges=cutting in _WHOLE_WORD_NAMES))
    if cutting in _COMPOSING_NAMES:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _word_cutter(file, cutting)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(file: GgufFile, **options: Any) -> BPE:
    try:
        return BPE(**options)
    except Exception as error:
        # The binding raises bare Exception for merges that name pieces outside the vocabulary.
        raise ModelError(f"{file.path}: its merges do not fit its vocabulary ({error}); pull the model again") from error


def _word_cutter(file: GgufFile, cutting: str) -> pre_tokenizers.PreTokenizer:
    if cutting in _GPT2_NAMES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cutting in _SINGLE_DIGIT_NAMES:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if cutting in _PATTERNS:
        words = pre_tokenizers.Split(Regex(_PATTERNS[cutting]), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_GPT2_NAMES, *_SINGLE_DIGIT_NAMES, *_PATTERNS))
    raise ModelError(f"{file.path}: pre-tokenizer {cutting!r} is not supported ({known} are); take the safetensors model")


def _sentencepiece_bpe(file: GgufFile, vocabulary: GgufVocabulary) -> Tokenizer:
    scores = _list_of(file, "tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.pieces):
        raise ModelError(f"{file.path}: {len(vocabulary.pieces)} tokens but {len(scores)} scores; pull the model again")
    if vocabulary.metadata.get("tokenizer.ggml.remove_extra_whitespaces") is True:
        raise ModelError(f"{file.path}: a tokenizer that drops spaces is not supported; take the safetensors model")
    unknown_id = vocabulary.special_ids.get("unk_token", 0)
    tokenizer = Tokenizer(
        _bpe(
            file,
            vocab={piece: token_id for token_id, piece in enumerate(vocabulary.pieces)},
            merges=merges_from_scores(vocabulary.pieces, scores, vocabulary.kinds),
            unk_token=vocabulary.pieces[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_prefix = bool(vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE_PIECE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE_PIECE), spaces]) if adds_prefix else spaces
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(pieces: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """List the merges of a SentencePiece BPE vocabulary, best first.

    SentencePiece joins the neighbouring pair whose joined piece has the highest score. Every cut of a piece into two pieces of the
    vocabulary is a merge with the score of the whole, so merging in this order joins the same pairs. Control tokens and the names
    of bytes (`<0x41>`) are not text, and are never joined from text that looks like them.
    """
    mergeable = {piece: token_id for token_id, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)) if kind == _NORMAL}
    ranked: list[tuple[float, int, int, int, tuple[str, str]]] = []
    for piece, token_id in mergeable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[token_id], token_id, mergeable[left], mergeable[right], (left, right)))
    return [entry[-1] for entry in sorted(ranked)]


def _add_post_processor(tokenizer: Tokenizer, vocabulary: GgufVocabulary) -> None:
    ids = vocabulary.special_ids
    before = ["bos_token"] if vocabulary.adds_bos and "bos_token" in ids else []
    after = ["eos_token"] if vocabulary.adds_eos and "eos_token" in ids else []
    if not before and not after:
        return
    texts = vocabulary.special_texts()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(texts[role] for role in before), "$A", *(texts[role] for role in after)],
        special_tokens=[(texts[role], ids[role]) for role in {*before, *after}],
    )


def _special_ids(file: GgufFile, num_tokens: int) -> dict[str, int]:
    ids: dict[str, int] = {}
    for role, key in _ROLES.items():
        name = f"tokenizer.ggml.{key}_token_id"
        token_id = file.metadata.get(name)
        if token_id is None:
            continue
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
            raise ModelError(f"{file.path}: {name} is {token_id!r}, not a token from 0 to {num_tokens - 1}; pull the model again")
        ids[role] = token_id
    return ids


def _end_ids(pieces: list[str], kinds: list[int], special_ids: Mapping[str, int]) -> list[int]:
    """The end token, the file's own end of a turn, and those known by their text, each once."""
    named = [special_ids[role] for role in ("eos_token", "eot_token") if role in special_ids]
    known = [index for index, piece in enumerate(pieces) if piece in _TURN_ENDS and kinds[index] in (_CONTROL, _USER_DEFINED)]
    return list(dict.fromkeys([*named, *known]))


def _list_of(file: GgufFile, key: str, kind: type[_Item]) -> list[_Item]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ModelError(f"{file.path}: metadata {key} is missing or not a list of {kind.__name__}; pull the model again")
    return value
