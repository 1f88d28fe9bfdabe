"""Incremental decoding against the tokenizers' own `decode`, for every supported kind of tokenizer and every split."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.errors import ModelError
from services.detokenizer.incremental_decoder import IncrementalDecoder
from services.detokenizer.token_table import TokenTable

KINDS = ["byte_level", "metaspace", "metaspace_never", "llama_like"]
HALF = "\N{REPLACEMENT CHARACTER}"


def _split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = [0, *sorted({min(cut, len(ids)) for cut in cuts}), len(ids)]
    return [ids[begin:end] for begin, end in pairwise(borders)]


def _stream(table: TokenTable, parts: list[list[int]]) -> tuple[list[str], str]:
    decoder = IncrementalDecoder(table)
    texts = [decoder.decode(part) for part in parts]
    return texts, decoder.flush()


def _draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    # A few ids past the vocabulary: worker vocabularies are padded, and the tokenizer leaves such tokens out.
    return data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=40))


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "metaspace_never"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_joined_text_equals_decode_of_all_tokens_for_every_split(
    tokenizers_by_kind: dict[str, Tokenizer],
    tables_by_kind: dict[str, TokenTable],
    kind: str,
    skip_special: bool,
    data: st.DataObject,
) -> None:
    # Byte-level pieces are drawn at random, so most runs hold broken and cut characters: they must come out the same too.
    tokenizer = tokenizers_by_kind[kind]
    ids = _draw_ids(data, tokenizer)
    table = tables_by_kind[kind].without_special() if skip_special else tables_by_kind[kind]
    texts, rest = _stream(table, _split(ids, data.draw(st.lists(st.integers(0, 40), max_size=8))))
    assert "".join(texts) + rest == tokenizer.decode(ids, skip_special_tokens=skip_special)


@pytest.mark.parametrize("skip_special", [True, False])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_byte_fallback_text_equals_decode_where_the_bytes_make_characters(
    tokenizers_by_kind: dict[str, Tokenizer], tables_by_kind: dict[str, TokenTable], skip_special: bool, data: st.DataObject
) -> None:
    # The tokenizer replaces a whole run of byte tokens for one bad byte, which no stream can foresee; so runs are good here.
    tokenizer = tokenizers_by_kind["llama_like"]
    vocabulary = tokenizer.get_vocab()
    plain = [id_ for token, id_ in vocabulary.items() if not token.startswith("<0x")]
    character = st.characters(codec="utf-8").map(lambda text: [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()])
    runs = data.draw(st.lists(st.one_of(st.sampled_from(plain).map(lambda id_: [id_]), character), max_size=20))
    ids = [id_ for run in runs for id_ in run]
    table = tables_by_kind["llama_like"].without_special() if skip_special else tables_by_kind["llama_like"]
    texts, rest = _stream(table, _split(ids, data.draw(st.lists(st.integers(0, 60), max_size=8))))
    assert rest == ""
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=skip_special)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters=HALF), max_size=30), data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_half_character_is_ever_shown(
    tables_by_kind: dict[str, TokenTable], tokenizers_by_kind: dict[str, Tokenizer], text: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    parts = _split(ids, data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    texts, rest = _stream(tables_by_kind["byte_level"], parts)
    assert not any(HALF in shown for shown in texts)
    assert "".join(texts) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_restored_state_goes_on_as_the_original(tables_by_kind: dict[str, TokenTable], kind: str, data: st.DataObject) -> None:
    table = tables_by_kind[kind]
    ids = data.draw(st.lists(st.integers(0, len(table.pieces) - 1), max_size=20))
    cut = data.draw(st.integers(0, len(ids)))
    decoder = IncrementalDecoder(table)
    decoder.decode(ids[:cut])
    state = decoder.state
    expected = decoder.decode(ids[cut:]) + decoder.flush()
    copy = IncrementalDecoder(table)
    copy.restore(state)
    assert copy.decode(ids[cut:]) + copy.flush() == expected


@pytest.mark.parametrize("kind", ["byte_level", "llama_like"])
def test_broken_bytes_come_out_at_once_and_hold_back_at_most_three_bytes(tables_by_kind: dict[str, TokenTable], kind: str) -> None:
    # The begin of a character, over and over, never becomes one; a decoder that waits for it grows without end.
    table = tables_by_kind[kind]
    lead = table.pieces.index(b"\xf0")
    decoder = IncrementalDecoder(table)
    shown = ""
    for _ in range(1000):
        shown += decoder.decode([lead])
        assert len(decoder.state[0]) <= 3
    assert shown == HALF * 999
    assert decoder.flush() == HALF


def test_a_character_that_began_in_the_prompt_is_completed(tables_by_kind: dict[str, TokenTable]) -> None:
    table = tables_by_kind["byte_level"]
    decoder = IncrementalDecoder(table)
    assert decoder.decode([table.pieces.index(b"\xc3")]) == ""
    assert decoder.decode([table.pieces.index(b"\xbc")]) == "ü"


@pytest.fixture(scope="module")
def default_model(default_model_directory: Path) -> tuple[Tokenizer, TokenTable]:
    """The default model's tokenizer and its table."""
    tokenizer = Tokenizer.from_file(str(default_model_directory / "tokenizer.json"))
    return tokenizer, TokenTable.from_tokenizer(tokenizer, model="default")


@pytest.mark.parametrize("skip_special", [True, False])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_default_model_equals_its_tokenizer_on_random_tokens(
    default_model: tuple[Tokenizer, TokenTable], skip_special: bool, data: st.DataObject
) -> None:
    # Random tokens of a real vocabulary mostly make broken characters at their borders.
    tokenizer, full = default_model
    table = full.without_special() if skip_special else full
    ids = data.draw(st.lists(st.integers(0, len(full.pieces) - 1), max_size=60))
    texts, rest = _stream(table, [[id_] for id_ in ids])
    assert "".join(texts) + rest == tokenizer.decode(ids, skip_special_tokens=skip_special)


def test_a_decoder_that_cannot_be_streamed_is_refused_by_name(unsupported_tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match=r"model odd: tokenizer\.json has the decoder Sequence with Replace .*Regex"):
        TokenTable.from_tokenizer(unsupported_tokenizer, model="odd")
