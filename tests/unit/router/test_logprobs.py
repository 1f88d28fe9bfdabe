"""Goal: logprobs that a detokenizer sends reach the request they are of, whole and in order."""

from __future__ import annotations

import math

import pytest

from headrace.errors import ProtocolError
from headrace.v1 import common_pb2 as common
from headrace.v1 import router_pb2 as router
from services.router import messages
from services.router.generation import LikelyToken, OutputPiece, TokenLogprob
from services.router.output_buffer import OutputBuffer


def deltas() -> router.OutputDeltas:
    """Three streams: the first asked for two likely tokens, the second for nothing, the third for its tokens alone."""
    return router.OutputDeltas(
        stream_ids=[7, 8, 9],
        first_positions=[0, 4, 5],
        num_tokens=[2, 1, 1],
        token_ids=[11, 12, 13, 14],
        texts=["ab", "c", "d"],
        logprobs=common.TokenLogprobs(
            rows=[0, 2],
            num_tokens=[2, 1],
            num_top=[2, 0],
            logprobs=[-1.0, -2.0, -3.0],
            top_token_ids=[11, 20, 21, 12],
            top_logprobs=[-1.0, -1.5, -0.5, -2.0],
        ),
        logprob_texts=[b"a", b"a", b"x", b"b", b"y", b"b", b"d"],
        prompt_logprobs=common.TokenLogprobs(
            rows=[0], num_tokens=[2], num_top=[1], logprobs=[math.nan, -4.0], top_token_ids=[0, 31], top_logprobs=[math.nan, -0.25]
        ),
        prompt_token_ids=[30, 32],
        prompt_texts=[b"P", b"", b"Q", b"R"],
    )


def test_each_stream_gets_its_own() -> None:
    (_, first), (_, second), (_, third) = messages.outputs(deltas())
    assert first.logprobs == (
        TokenLogprob(11, b"a", -1.0, (LikelyToken(11, b"a", -1.0), LikelyToken(20, b"x", -1.5))),
        TokenLogprob(12, b"b", -2.0, (LikelyToken(21, b"y", -0.5), LikelyToken(12, b"b", -2.0))),
    )
    assert first.prompt_logprobs == (
        TokenLogprob(30, b"P", None, ()),
        TokenLogprob(32, b"Q", -4.0, (LikelyToken(31, b"R", -0.25),)),
    )
    assert (second.logprobs, second.prompt_logprobs) == ((), ())
    assert (third.logprobs, third.prompt_logprobs) == ((TokenLogprob(14, b"d", -3.0),), ())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body.logprobs.logprobs.append(-1.0),
        lambda body: body.logprobs.num_tokens.append(1),
        lambda body: body.logprobs.top_token_ids.pop(),
        lambda body: body.logprob_texts.pop(),
        lambda body: body.logprobs.rows.pop(),
        lambda body: body.num_tokens.__setitem__(slice(0, 2), [1, 2]),
        lambda body: body.prompt_token_ids.pop(),
        lambda body: body.prompt_texts.append(b"z"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(spoil: object) -> None:
    body = deltas()
    spoil(body)  # type: ignore[operator]
    with pytest.raises(ProtocolError):
        list(messages.outputs(body))


def test_the_buffer_runs_them_together_and_counts_them() -> None:
    one, two = TokenLogprob(1, b"a", -1.0), TokenLogprob(2, b"b", -2.0, (LikelyToken(3, b"c", -0.1),))
    buffer = OutputBuffer(150)
    is_over = []
    for piece in (
        OutputPiece("a", (1,), logprobs=(one,), prompt_logprobs=(two,)),
        OutputPiece("b", (2,), "stop", logprobs=(two,)),
    ):
        buffer.put(piece)
        is_over.append(buffer.is_over_limit)
    assert buffer.take(0) == OutputPiece("ab", (1, 2), "stop", 0, logprobs=(one, two), prompt_logprobs=(two,))
    assert [*is_over, buffer.is_over_limit] == [False, True, False]
