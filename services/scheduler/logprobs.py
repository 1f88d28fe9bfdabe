"""Logprobs of one sequence's tokens, in flat arrays, kept while the scheduler has it, so that its output can be sent again.

The scheduler does not look at them. What is asked for is fixed for a sequence, so its tokens all have as many likely ones beside
them, and any part is a slice.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

NUMBERS_MAX = 200_000
"""Most logprobs that a prompt may ask for, likely tokens included; all of them are in memory, and in one message, at once."""


PROMPT_LOGITS_MAX = 128
"""Prompt tokens of a step whose logprobs are wanted: each has logits over the whole vocabulary in the worker's memory."""


@dataclass(slots=True)
class TokenLogs:
    """Logprobs of tokens that follow one another.

    Attributes:
        num_top: Likely tokens told beside each.
        logprobs: Of each token; NaN where it is not known.
        top_token_ids: The likely ones, flat.
        top_logprobs: Theirs.
    """

    num_top: int
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    top_token_ids: array[int] = field(default_factory=lambda: array("I"))
    top_logprobs: array[float] = field(default_factory=lambda: array("f"))

    def __len__(self) -> int:
        """Tokens told of."""
        return len(self.logprobs)

    def extend(self, logprobs: Iterable[float], top_token_ids: Iterable[int], top_logprobs: Iterable[float]) -> None:
        """Append what is told of further tokens."""
        self.logprobs.extend(logprobs)
        self.top_token_ids.extend(top_token_ids)
        self.top_logprobs.extend(top_logprobs)

    def append(self, other: TokenLogs) -> None:
        """Append another's."""
        self.extend(other.logprobs, other.top_token_ids, other.top_logprobs)

    def skip(self, num_tokens: int) -> None:
        """Append tokens of which nothing is known."""
        self.extend([math.nan] * num_tokens, [0] * (num_tokens * self.num_top), [math.nan] * (num_tokens * self.num_top))

    def clear(self) -> None:
        """Forget all tokens."""
        for values in (self.logprobs, self.top_token_ids, self.top_logprobs):
            del values[:]

    def part(self, start: int, end: int) -> TokenLogs:
        """Those of some tokens, from one to before another."""
        likely = slice(start * self.num_top, end * self.num_top)
        return TokenLogs(self.num_top, self.logprobs[start:end], self.top_token_ids[likely], self.top_logprobs[likely])


def split(
    num_tokens: list[int], num_top: list[int], logprobs: array[float], top_token_ids: array[int], top_logprobs: array[float]
) -> Iterator[TokenLogs]:
    """Rows of a message's flat arrays, which have been found to fit each other."""
    start = start_top = 0
    for count, most in zip(num_tokens, num_top, strict=True):
        end, end_top = start + count, start_top + count * most
        yield TokenLogs(most, logprobs[start:end], top_token_ids[start_top:end_top], top_logprobs[start_top:end_top])
        start, start_top = end, end_top
