"""Tokenizers rebuilt from GGUF: byte-level BPE, and SentencePiece BPE against its own algorithm written out."""

from __future__ import annotations

import string
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.errors import ModelError
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_tokenizer import build_tokenizer, read_vocabulary


def build(builder, tmp_path) -> Tokenizer:
    file = GgufFile(builder.write(tmp_path / "a.gguf"))
    return build_tokenizer(file, read_vocabulary(file))


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def test_merges_and_special_tokens_apply(llama_builder, tmp_path):
    tokenizer = build(llama_builder, tmp_path)
    assert tokens(tokenizer, "hello<|end|>he") == ["hell", "o", "<|end|>", "he"]
    assert tokenizer.decode(tokenizer.encode("hello<|end|>").ids) == "hello"


def test_digits_are_single_tokens_apart_from_the_space_before(llama_builder, tmp_path):
    llama_builder.metadata["tokenizer.ggml.tokens"] += ["12", "Ġ1"]
    llama_builder.metadata["tokenizer.ggml.token_type"] += [1, 1]
    llama_builder.metadata["tokenizer.ggml.merges"] += ["1 2", "Ġ 1"]
    assert tokens(build(llama_builder, tmp_path), "a 12") == ["a", "Ġ", "1", "2"]
    llama_builder.metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert tokens(build(llama_builder, tmp_path), "a 12") == ["a", "Ġ", "12"]


def test_llama3_words_cut_numbers_in_threes_and_take_whole_words(llama_builder, tmp_path):
    llama_builder.metadata["tokenizer.ggml.pre"] = "llama-bpe"
    llama_builder.metadata["tokenizer.ggml.tokens"] += ["1234", "123", "whole"]
    llama_builder.metadata["tokenizer.ggml.token_type"] += [1, 1, 1]
    assert tokens(build(llama_builder, tmp_path), "1234 whole") == ["123", "4", "Ġ", "w", "h", "o", "l", "e"]
    assert tokens(build(llama_builder, tmp_path), "whole") == ["whole"]


WORDS = {
    "dbrx": ["camelCase", "'s", " ", " x", " ", "123", "4", "!\n", "y"],
    "qwen2": ["camelCase", "'s", " ", " x", " ", "1", "2", "3", "4", "!\n", "y"],
    "gpt-4o": ["camel", "Case's", " ", " x", " ", "123", "4", "!\n", "y"],
    "tekken": ["camel", "Case", "'s", " ", " x", " ", "1", "2", "3", "4", "!\n", "y"],
}


@pytest.mark.parametrize("cutting", WORDS)
def test_words_are_cut_as_the_file_says(cutting, llama_builder, tmp_path):
    llama_builder.metadata["tokenizer.ggml.pre"] = cutting
    tokenizer = build(llama_builder, tmp_path)
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("camelCase's  x 1234!\ny")
    assert [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in cut] == WORDS[cutting]


def test_qwen_composes_characters_and_others_do_not(llama_builder, tmp_path):
    for cutting, expected in (("qwen2", "\u00e9"), ("llama-bpe", "e\u0301")):
        llama_builder.metadata["tokenizer.ggml.pre"] = cutting
        tokenizer = build(llama_builder, tmp_path)
        assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == expected


def test_whatever_ends_a_turn_ends_an_answer(llama_builder, tmp_path):
    metadata = llama_builder.metadata
    extra = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"]
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += extra
    # One that is plain text ends nothing.
    metadata["tokenizer.ggml.token_type"] += [3, 4, 1]
    metadata["tokenizer.ggml.eot_token_id"] = first
    vocabulary = read_vocabulary(GgufFile(llama_builder.write(tmp_path / "a.gguf")))
    assert vocabulary.end_ids == [0, first, first + 1]
    assert "eot_token" not in vocabulary.special_ids


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_byte_level_text_survives_the_round_trip(text, llama_builder, tmp_path):
    tokenizer = build(llama_builder, tmp_path)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_beginning_and_end_are_added_where_the_file_says_so(llama_builder, tmp_path):
    llama_builder.metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = build(llama_builder, tmp_path)
    assert tokens(tokenizer, "o") == ["<|user|>", "o", "<|end|>"]
    assert tokenizer.encode("o", add_special_tokens=False).tokens == ["o"]


def spm_builder(builder, *, prefix: bool = True):
    """Pieces: unknown, two control tokens, 256 bytes, letters, and joined pieces whose scores fall with their length and place."""
    joined = ["▁t", "he", "▁the", "in", "er", "▁a", "re", "ther", "▁th", "here", "at", "that", "▁that", "aa", "aaa", "aaaa", "▁▁"]
    singles = ["▁", *string.ascii_lowercase]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *joined, *singles]
    builder.metadata |= {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(joined) + len(singles))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(singles))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return builder


def sentencepiece_reference(text: str, pieces: list[str], scores: list[float], *, prefix: bool) -> list[int]:
    """SentencePiece BPE as defined: join the neighbours whose joined piece scores best, leftmost first, until none is a piece."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    if prefix and text:
        text = " " + text
    parts = list(text.replace(" ", "▁"))
    while True:
        candidates = [
            (-scores[ids[left + right]], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if ids.get(left + right, 0) >= 259
        ]
        if not candidates:
            break
        place = min(candidates)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="thera in▁é漢😀0", max_size=30))
def test_sentencepiece_ids_equal_its_algorithm(prefix, text, gguf_builder, tmp_path):
    metadata = spm_builder(gguf_builder, prefix=prefix).metadata
    tokenizer = build(gguf_builder, tmp_path)
    pieces, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]

    ids = tokenizer.encode(text, add_special_tokens=False).ids

    assert ids == sentencepiece_reference(text, pieces, scores, prefix=prefix)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_text_that_looks_like_the_name_of_a_byte_is_text(gguf_builder, tmp_path):
    spm_builder(gguf_builder, prefix=False)
    metadata = gguf_builder.metadata
    extra = ["<", "0", "4", "1", ">", "<0", "<0x", "<0x4", "<0x41"]
    metadata["tokenizer.ggml.tokens"] += extra
    metadata["tokenizer.ggml.scores"] += [-1000.0 - index for index in range(len(extra))]
    metadata["tokenizer.ggml.token_type"] += [1] * len(extra)
    assert tokens(build(gguf_builder, tmp_path), "<0x41>") == ["<s>", "<0x41", ">"]


def test_phi3s_special_tokens_take_in_the_space_after_them(gguf_builder, tmp_path):
    spm_builder(gguf_builder, prefix=False)
    metadata = gguf_builder.metadata
    metadata["tokenizer.ggml.tokens"] += ["<|user|>", "<|endoftext|>"]
    metadata["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    text = "<|user|> a<|endoftext|> a"
    assert tokens(build(gguf_builder, tmp_path), text)[1:] == ["<|user|>", "▁a", "<|endoftext|>", "▁a"]
    metadata["general.architecture"] = "phi3"
    assert tokens(build(gguf_builder, tmp_path), text)[1:] == ["<|user|> ", "a", "<|endoftext|>", "▁a"]


def test_sentencepiece_starts_with_the_beginning_token_by_default(gguf_builder, tmp_path):
    assert tokens(build(spm_builder(gguf_builder), tmp_path), "the") == ["<s>", "▁the"]


BAD = {
    "other model": ({"tokenizer.ggml.model": "wordpiece"}, "'wordpiece' is not supported"),
    "no model": ({"tokenizer.ggml.model": None}, "tokenizer None is not supported"),
    "unknown words": ({"tokenizer.ggml.pre": "chatglm-bpe"}, "'chatglm-bpe' is not supported"),
    "words not named": ({"tokenizer.ggml.pre": None}, "'None' is not supported"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
    "tokens of another kind": ({"tokenizer.ggml.tokens": [1, 2]}, "not a list of str"),
    "types short": ({"tokenizer.ggml.token_type": [1]}, "261 tokens but 1 token types"),
    "double token": ({"tokenizer.ggml.tokens": ["a"] * 261}, "token twice"),
    "merge of strangers": ({"tokenizer.ggml.merges": ["zz yy"]}, "merges do not fit"),
    "merge of one": ({"tokenizer.ggml.merges": ["zz"]}, "not a pair"),
    "special beyond": ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999"),
}


@pytest.mark.parametrize("case", BAD)
def test_tokenizer_that_cannot_be_rebuilt_is_refused(case, llama_builder, tmp_path):
    values, message = BAD[case]
    for key, value in values.items():
        del llama_builder.metadata[key]
        if value is not None:
            llama_builder.metadata[key] = value
    with pytest.raises(ModelError, match=message) as caught:
        build(llama_builder, tmp_path)
    assert "\n" not in str(caught.value)
