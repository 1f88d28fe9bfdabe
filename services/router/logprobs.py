"""Logprobs on the wire, read into the form that protocol layers share. Pure.

An `OutputDeltas` carries them as flat arrays; they become objects here, one a token, only for the requests that asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from headrace.errors import ProtocolError
from headrace.v1 import common_pb2 as common
from headrace.v1 import router_pb2 as router
from services.router.generation import LikelyToken, TokenLogprob


def of_outputs(deltas: router.OutputDeltas) -> dict[int, tuple[TokenLogprob, ...]]:
    """Logprobs of the message's tokens, by the place of their stream; token ids are still to be filled in, see `beside`.

    Raises:
        ProtocolError: The arrays do not fit each other.
    """
    return _rows(deltas.logprobs, deltas.logprob_texts)


def of_prompts(deltas: router.OutputDeltas) -> dict[int, tuple[TokenLogprob, ...]]:
    """Logprobs of whole prompts, by the place of their stream.

    Raises:
        ProtocolError: The arrays do not fit each other.
    """
    rows = _rows(deltas.prompt_logprobs, deltas.prompt_texts)
    token_ids = list(deltas.prompt_token_ids)
    if len(token_ids) != sum(len(told) for told in rows.values()):
        raise ProtocolError(f"OutputDeltas with {len(token_ids)} prompt tokens for logprobs of others")
    ids = iter(token_ids)
    return {row: beside([next(ids) for _ in told], told) for row, told in rows.items()}


def beside(token_ids: Sequence[int], told: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...]:
    """Fill in the ids of tokens of which logprobs are told.

    Raises:
        ProtocolError: There are not as many.
    """
    if len(told) != len(token_ids):
        raise ProtocolError(f"OutputDeltas with {len(told)} logprobs for {len(token_ids)} tokens")
    return tuple(token._replace(token_id=token_id) for token_id, token in zip(token_ids, told, strict=True))


def _rows(arrays: common.TokenLogprobs, texts: Sequence[bytes]) -> dict[int, tuple[TokenLogprob, ...]]:
    rows, counts, num_top = arrays.rows, list(arrays.num_tokens), list(arrays.num_top)
    num_tokens, num_likely = sum(counts), sum(count * most for count, most in zip(counts, num_top, strict=False))
    if (
        not len(rows) == len(counts) == len(num_top)
        or len(arrays.logprobs) != num_tokens
        or not len(arrays.top_token_ids) == len(arrays.top_logprobs) == num_likely
        or len(texts) != num_tokens + num_likely
    ):
        raise ProtocolError(f"OutputDeltas with logprobs of {len(rows)} streams in arrays of other lengths")
    tokens = _tokens(arrays, texts, counts, num_top)
    return {row: tuple(next(tokens) for _ in range(count)) for row, count in zip(rows, counts, strict=True)}


def _tokens(
    arrays: common.TokenLogprobs, texts: Sequence[bytes], counts: Sequence[int], num_top: Sequence[int]
) -> Iterator[TokenLogprob]:
    pieces = iter(texts)
    likely = zip(arrays.top_token_ids, arrays.top_logprobs, strict=True)
    own = iter(arrays.logprobs)
    for count, most in zip(counts, num_top, strict=True):
        for _ in range(count):
            text, logprob = next(pieces), next(own)
            found = []
            for _ in range(most):
                token_id, likely_logprob = next(likely)
                piece = next(pieces)
                if not math.isnan(likely_logprob):
                    found.append(LikelyToken(token_id, piece, likely_logprob))
            yield TokenLogprob(0, text, None if math.isnan(logprob) else logprob, tuple(found))
