"""Text to tokens and back for one model, with every check a prompt must pass before it costs anything.

An `Encoder` owns one instance of the tokenizers library and is used by one thread at a time. All errors name the field of the
client's request, the limit and the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from headrace.errors import ContextLengthError, InvalidRequestError, ModelError

TokenIds = npt.NDArray[np.int32]
"""Token ids, int32, shape [num_tokens]."""
Field = Literal["prompt", "messages", "text", "tokens"]
"""The field of the client's request that an error is about."""


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What a prompt must fit into.

    Attributes:
        model: Name that clients use.
        vocab_size: Token ids are below it.
        max_model_len: Most tokens of prompt and output together.
        prompt_bytes_max: Longest text that is encoded at all, in UTF-8.
    """

    model: str
    vocab_size: int
    max_model_len: int
    prompt_bytes_max: int

    def check_text(self, text: str, field: Field) -> None:
        """Refuse text that is too long to encode, or no Unicode text.

        Raises:
            InvalidRequestError: Says which.
        """
        try:
            num_bytes = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{field}: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), which is not text",
                param=field,
            ) from error
        if num_bytes > self.prompt_bytes_max:
            raise ContextLengthError(
                f"{field}: {num_bytes} bytes of text, the limit is {self.prompt_bytes_max}; the model's context length is "
                f"{self.max_model_len} tokens",
                param=field,
            )

    def check_token_ids(self, token_ids: TokenIds, field: Field) -> None:
        """Refuse ids outside the vocabulary.

        Raises:
            InvalidRequestError: Names the first such id and its place.
        """
        wrong = np.flatnonzero((token_ids < 0) | (token_ids >= self.vocab_size))
        if len(wrong):
            index = int(wrong[0])
            raise InvalidRequestError(
                f"{field}: token id {int(token_ids[index])} at index {index} is not one of the model's, which go from 0 to "
                f"{self.vocab_size - 1}",
                param=field,
            )

    def check_length(self, num_tokens: int, *, max_tokens: int | None, field: Field) -> None:
        """Refuse a prompt that leaves no room for an answer, or not for the answer asked for.

        Raises:
            ContextLengthError: Names the context length, what was asked for, and what would fit.
        """
        limit = self.max_model_len
        if num_tokens == 0:
            raise InvalidRequestError(f"{field}: has no tokens; at least 1 is needed", param=field)
        if num_tokens >= limit:
            raise ContextLengthError(
                f"{field}: this model's maximum context length is {limit} tokens, but the {field} resulted in {num_tokens} tokens, "
                f"and an answer needs at least 1; shorten the {field} to at most {limit - 1} tokens",
                param=field,
            )
        if max_tokens is not None and num_tokens + max_tokens > limit:
            raise ContextLengthError(
                f"max_tokens: this model's maximum context length is {limit} tokens, but you requested {num_tokens + max_tokens} "
                f"({num_tokens} in the {field}, {max_tokens} as max_tokens); shorten the {field} or set max_tokens to at most "
                f"{limit - num_tokens}",
                param="max_tokens",
            )


class Encoder:
    """Encodes and decodes for one thread."""

    def __init__(self, tokenizer_json: str, limits: PromptLimits) -> None:
        """Load a tokenizer.

        Args:
            tokenizer_json: Content of tokenizer.json.
            limits: What prompts must fit into.

        Raises:
            ModelError: The content is no tokenizer.
        """
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:
            raise ModelError(f"model {limits.model}: tokenizer.json cannot be loaded: {error}; pull the model again") from error
        # A file may carry settings of its training; a server neither cuts nor fills prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._limits = limits

    @property
    def tokenizer_vocab_size(self) -> int:
        """Ids the tokenizer itself knows; the model's vocabulary may be padded beyond it."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool, field: Field) -> TokenIds:
        """Encode text that may be of any length and content.

        Raises:
            InvalidRequestError: The text is too long, or no Unicode text.
        """
        self._limits.check_text(text, field)
        # The batch call, even for one text: it leaves out the offsets, and releases the interpreter lock for all of its work.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return np.array(encoding.ids, dtype=np.int32)

    def decode(self, token_ids: TokenIds, *, skip_special_tokens: bool) -> str:
        """Decode whole tokens.

        Raises:
            InvalidRequestError: There are too many, or an id is not one of the model's.
        """
        if len(token_ids) > self._limits.prompt_bytes_max:
            raise InvalidRequestError(
                f"tokens: {len(token_ids)} tokens, the limit is {self._limits.prompt_bytes_max}", param="tokens"
            )
        self._limits.check_token_ids(token_ids, "tokens")
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=skip_special_tokens)
