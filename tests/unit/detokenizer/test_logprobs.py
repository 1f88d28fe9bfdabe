"""Goal: a router gets one logprob for each token it gets, and the bytes of all tokens named, whatever is cut or rewound."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from headrace.errors import ProtocolError
from headrace.v1.common_pb2 import FinishReason, TokenLogprobs
from headrace.v1.detokenizer_pb2 import TokenBatch
from headrace.v1.router_pb2 import OutputDeltas
from services.detokenizer import logprobs
from services.detokenizer.streams import Batch, StreamLimits, StreamStart, StreamTable
from services.detokenizer.token_table import TokenTable

ROUTER, SCHEDULER, STREAM, OTHER = 1, 3, 77, 78
NONE = FinishReason.FINISH_REASON_UNSPECIFIED


@pytest.fixture
def table(tables_by_kind: dict[str, TokenTable]) -> TokenTable:
    return tables_by_kind["byte_level"]


@pytest.fixture
def streams(table: TokenTable) -> StreamTable:
    return StreamTable(table, StreamLimits(unsent_tokens_max=2, pending_tokens_max=100))


def token_of(table: TokenTable, text: str) -> int:
    return table.pieces.index(text.encode())


def batch_of(first: int, token_ids: list[int], prompt: list[int] | None = None) -> TokenBatch:
    """Tokens of a stream that asked for one likely token, at positions told by their logprobs, and of one that did not ask."""
    body = TokenBatch(
        stream_ids=[OTHER, STREAM],
        first_positions=[first, first],
        num_tokens=[1, len(token_ids)],
        token_ids=[5, *token_ids],
        logprobs=TokenLogprobs(
            rows=[1],
            num_tokens=[len(token_ids)],
            num_top=[1],
            logprobs=[-1.0 - first - index for index in range(len(token_ids))],
            top_token_ids=[token_id + 1 for token_id in token_ids],
            top_logprobs=[-0.5 - first - index for index in range(len(token_ids))],
        ),
    )
    if prompt:
        body.prompt_logprobs.CopyFrom(
            TokenLogprobs(rows=[1], num_tokens=[len(prompt)], num_top=[0], logprobs=[math.nan, *[-9.0] * (len(prompt) - 1)])
        )
        body.prompt_token_ids.extend(prompt)
    return body


def take(streams: StreamTable, body: TokenBatch) -> None:
    batch = Batch(
        stream_ids=list(body.stream_ids),
        first_positions=list(body.first_positions),
        token_ids=list(body.token_ids),
        num_tokens=list(body.num_tokens),
        told=logprobs.told_by_stream(body),
    )
    batch.check()
    for part in batch.split(2):
        streams.apply(part, source=SCHEDULER, now_ns=0)


def read(streams: StreamTable, table: TokenTable) -> OutputDeltas:
    """All that is unsent, as the message that a router gets."""
    deltas = streams.outbox(ROUTER).deltas()
    assert deltas is not None
    body = OutputDeltas(stream_ids=deltas.stream_ids, num_tokens=deltas.num_tokens, token_ids=deltas.token_ids)
    logprobs.fill(body, deltas.told, streams.pieces)
    streams.mark_sent(ROUTER)
    return body


def open_both(streams: StreamTable, stops: tuple[str, ...] = ()) -> None:
    for stream_id in (STREAM, OTHER):
        streams.open(StreamStart(stream_id, stops=stops), owner=ROUTER, now_ns=0)


def test_each_token_goes_on_with_its_own_and_the_prompt_with_the_first(streams: StreamTable, table: TokenTable) -> None:
    open_both(streams)
    take(streams, batch_of(0, [10, 11, 12], prompt=[20, 21]))
    body = read(streams, table)
    place = list(body.stream_ids).index(STREAM)
    assert (list(body.logprobs.rows), list(body.logprobs.num_tokens), list(body.logprobs.num_top)) == ([place], [3], [1])
    assert list(body.logprobs.logprobs) == [-1.0, -2.0, -3.0]
    assert list(body.logprobs.top_token_ids) == [11, 12, 13]
    assert list(body.logprob_texts) == [table.pieces[token_id] for token_id in (10, 11, 11, 12, 12, 13)]
    assert list(body.prompt_token_ids) == [20, 21]
    assert list(body.prompt_texts) == [table.pieces[20], table.pieces[21]]
    assert (math.isnan(body.prompt_logprobs.logprobs[0]), body.prompt_logprobs.logprobs[1]) == (True, -9.0)
    # Positions seen before tell nothing new; those behind them do.
    take(streams, batch_of(2, [12, 13]))
    body = read(streams, table)
    assert list(body.logprobs.logprobs) == [-4.0]
    assert not body.HasField("prompt_logprobs")


def test_those_who_ask_for_nothing_send_nothing_more(streams: StreamTable, table: TokenTable) -> None:
    streams.open(StreamStart(OTHER), owner=ROUTER, now_ns=0)
    take(streams, TokenBatch(stream_ids=[OTHER], first_positions=[0], num_tokens=[1], token_ids=[5]))
    body = read(streams, table)
    assert not body.HasField("logprobs")
    assert not body.HasField("prompt_logprobs")


def test_tokens_behind_a_stop_string_tell_nothing(streams: StreamTable, table: TokenTable) -> None:
    open_both(streams, stops=("b",))
    take(streams, batch_of(0, [token_of(table, letter) for letter in "abc"]))
    body = read(streams, table)
    assert list(body.logprobs.logprobs) == [-1.0, -2.0]
    assert len(body.logprob_texts) == 4


def test_tokens_that_came_before_their_stream_keep_theirs(streams: StreamTable, table: TokenTable) -> None:
    take(streams, batch_of(0, [10], prompt=[20, 21]))
    open_both(streams)
    body = read(streams, table)
    assert list(body.logprobs.logprobs) == [-1.0]
    assert list(body.prompt_token_ids) == [20, 21]


def test_a_rewound_stream_takes_them_again_once(streams: StreamTable, table: TokenTable) -> None:
    open_both(streams)
    take(streams, batch_of(0, [10], prompt=[20, 21]))
    assert streams.mark_unsent(ROUTER) == 0
    take(streams, batch_of(1, [11, 12, 13]))
    assert streams.mark_unsent(ROUTER) == 1
    take(streams, batch_of(1, [11, 12]))
    body = read(streams, table)
    assert list(body.logprobs.logprobs) == [-1.0, -2.0, -3.0]
    assert list(body.logprobs.top_token_ids) == [11, 12, 13]
    assert list(body.prompt_token_ids) == [20, 21]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body.logprobs.logprobs.append(-1.0),
        lambda body: body.logprobs.top_logprobs.pop(),
        lambda body: body.logprobs.rows.__setitem__(0, 2),
        lambda body: body.num_tokens.__setitem__(1, 1),
        lambda body: body.prompt_token_ids.append(1),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(spoil: Callable[[TokenBatch], object]) -> None:
    body = batch_of(0, [10, 11], prompt=[20, 21])
    spoil(body)
    with pytest.raises(ProtocolError):
        logprobs.told_by_stream(body)
