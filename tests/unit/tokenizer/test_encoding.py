"""Encoding and the checks before it: each refusal names the field, the limit and the value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import InvalidRequestError, ModelError
from services.tokenizer.encoding import Encoder, PromptLimits

LIMITS = PromptLimits(model="tiny", vocab_size=260, max_model_len=64, prompt_bytes_max=100)


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer_json: str) -> Encoder:
    return Encoder(tiny_tokenizer_json, LIMITS)


@given(text=st.text(st.characters(codec="utf-8"), max_size=25))
def test_text_comes_back_whatever_it_is(encoder: Encoder, text: str) -> None:
    tokens = encoder.encode(text, add_special_tokens=False, field="prompt")
    assert tokens.dtype == np.int32
    assert encoder.decode(tokens, skip_special_tokens=False) == text


def test_special_tokens_are_added_only_when_asked(encoder: Encoder) -> None:
    assert encoder.encode("a", add_special_tokens=True, field="prompt").tolist()[0] == 256
    assert len(encoder.encode("a", add_special_tokens=False, field="prompt")) == 1


def test_training_settings_of_the_file_do_not_cut_or_fill(encoder: Encoder) -> None:
    assert len(encoder.encode("x" * 50, add_special_tokens=False, field="prompt")) == 50
    assert len(encoder.encode("", add_special_tokens=False, field="prompt")) == 0


def test_special_tokens_are_skipped_when_asked(encoder: Encoder) -> None:
    tokens = encoder.encode("a</s>", add_special_tokens=True, field="prompt")
    assert encoder.decode(tokens, skip_special_tokens=True) == "a"
    assert encoder.decode(tokens, skip_special_tokens=False) == "<s>a</s>"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("x" * 101, r"messages: 101 bytes of text, the limit is 100"),
        ("ü" * 51, r"messages: 102 bytes of text, the limit is 100"),
        ("ab\ud800", r"messages: character 2 is a lone surrogate \(U\+D800\)"),
    ],
)
def test_text_is_refused_before_it_is_encoded(encoder: Encoder, text: str, pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=pattern) as caught:
        encoder.encode(text, add_special_tokens=True, field="messages")
    assert caught.value.param == "messages"


@pytest.mark.parametrize("token_id", [-1, 260, 2**31 - 1])
def test_a_token_id_outside_the_vocabulary_is_named_with_its_place(encoder: Encoder, token_id: int) -> None:
    tokens = np.array([1, 2, token_id, -7], dtype=np.int32)
    with pytest.raises(InvalidRequestError, match=rf"prompt: token id {token_id} at index 2 .* from 0 to 259"):
        LIMITS.check_token_ids(tokens, "prompt")
    with pytest.raises(InvalidRequestError, match=rf"tokens: token id {token_id} at index 2"):
        encoder.decode(tokens, skip_special_tokens=True)


def test_ids_of_the_padded_vocabulary_decode_to_nothing(encoder: Encoder) -> None:
    assert encoder.decode(np.array([259], dtype=np.int32), skip_special_tokens=False) == ""


def test_too_many_tokens_to_decode_are_refused(encoder: Encoder) -> None:
    with pytest.raises(InvalidRequestError, match="tokens: 101 tokens, the limit is 100"):
        encoder.decode(np.zeros(101, dtype=np.int32), skip_special_tokens=True)


@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(1, None), (63, None), (63, 1), (1, 63), (10, 0)])
def test_what_fits_the_context_passes(num_tokens: int, max_tokens: int | None) -> None:
    LIMITS.check_length(num_tokens, max_tokens=max_tokens, field="prompt")


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "param", "pattern"),
    [
        (0, None, "prompt", "prompt: has no tokens"),
        (64, None, "prompt", "maximum context length is 64 tokens, but the prompt resulted in 64 tokens.*at most 63 tokens"),
        (64, 1, "prompt", "resulted in 64 tokens"),
        (63, 2, "max_tokens", r"you requested 65 \(63 in the prompt, 2 as max_tokens\).*max_tokens to at most 1"),
        (1, 4_000_000_000, "max_tokens", "4000000001"),
    ],
)
def test_what_does_not_fit_names_the_limit_and_what_would(
    num_tokens: int, max_tokens: int | None, param: str, pattern: str
) -> None:
    with pytest.raises(InvalidRequestError, match=pattern) as caught:
        LIMITS.check_length(num_tokens, max_tokens=max_tokens, field="prompt")
    assert caught.value.param == param


def test_a_broken_tokenizer_file_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"model tiny: tokenizer\.json cannot be loaded"):
        Encoder("{}", LIMITS)
