"""Logprobs in OpenAI's shapes, and prompts' in vLLM's. Pure.

A token's text may be a part of a character: it is shown as `bytes:\\xe2\\x82` then, which keeps tokens of other bytes apart; where
OpenAI has a list of bytes beside the text, that is exact.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from services.router.generation import TokenLogprob


def token_text(piece: bytes) -> str:
    """A token as text."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, object]:
    """`choices[].logprobs` of a chat completion."""
    content = [
        {
            **_chat_token(token.text, token.logprob),
            "top_logprobs": [_chat_token(likely.text, likely.logprob) for likely in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: bytes, logprob: float | None) -> dict[str, object]:
    return {"token": token_text(text), "logprob": logprob, "bytes": list(text)}


def prompt_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, object] | None]:
    """`prompt_logprobs`: for each token of the prompt itself and the likeliest in its place by id; null for the first."""
    return [None if token.logprob is None else _prompt_token(token) for token in tokens]


def _prompt_token(token: TokenLogprob) -> dict[str, object]:
    found: dict[str, object] = {
        str(likely.token_id): {"logprob": likely.logprob, "rank": rank, "decoded_token": token_text(likely.text)}
        for rank, likely in enumerate(token.top, start=1)
    }
    # Beyond the likeliest nobody has counted.
    found.setdefault(str(token.token_id), {"logprob": token.logprob, "rank": None, "decoded_token": token_text(token.text)})
    return found


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, choice by choice as its tokens come."""

    def __init__(self) -> None:
        self._offsets: dict[int, _Offset] = {}

    def add(self, choice: int, tokens: Sequence[TokenLogprob]) -> dict[str, object]:
        """The object for further tokens of a choice.

        `text_offset` counts characters of all its tokens before, special tokens included; a token that goes on with a character has
        the offset of that character.
        """
        offset = self._offsets.get(choice)
        if offset is None:
            offset = self._offsets[choice] = _Offset()
        return {
            "text_offset": [offset.before(token.text) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "tokens": [token_text(token.text) for token in tokens],
            "top_logprobs": [_likely(token) for token in tokens],
        }


class _Offset:
    """Characters before the next token."""

    def __init__(self) -> None:
        self._num_chars = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def before(self, piece: bytes) -> int:
        """Where a token begins; the next one begins behind it."""
        num_before = self._num_chars
        self._num_chars += len(self._decoder.decode(piece))
        return num_before


def _likely(token: TokenLogprob) -> dict[str, float] | None:
    """The likeliest and the token itself, as OpenAI has it: one more where it is not among them."""
    if token.logprob is None:
        return None
    found = {token_text(likely.text): likely.logprob for likely in token.top}
    found.setdefault(token_text(token.text), token.logprob)
    return found
