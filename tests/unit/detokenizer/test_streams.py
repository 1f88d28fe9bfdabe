"""The table of streams: positions, ends, stops, streams that begin again, and routers that do not read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import OverloadedError, ProtocolError
from headrace.v1.common_pb2 import FinishReason
from services.detokenizer.streams import Batch, BatchEffects, StreamLimits, StreamStart, StreamTable
from services.detokenizer.token_table import TokenTable

ROUTER, OTHER_ROUTER, SCHEDULER = 1, 2, 3
STREAM = 77
NONE, STOP, LENGTH, ERROR = (
    FinishReason.FINISH_REASON_UNSPECIFIED,
    FinishReason.FINISH_REASON_STOP,
    FinishReason.FINISH_REASON_LENGTH,
    FinishReason.FINISH_REASON_ERROR,
)
SECOND = 1_000_000_000


@pytest.fixture
def table(tables_by_kind: dict[str, TokenTable]) -> TokenTable:
    return tables_by_kind["byte_level"]


@pytest.fixture
def streams(table: TokenTable) -> StreamTable:
    return StreamTable(table, StreamLimits(unsent_tokens_max=4, pending_tokens_max=20))


class Reader:
    """A router that reads: gathers text, tokens and the end of each stream, and checks positions as it goes."""

    def __init__(self, streams: StreamTable, owner: int = ROUTER) -> None:
        self._streams = streams
        self._owner = owner
        self.texts: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}
        self.cached: dict[int, int] = {}

    def read(self) -> None:
        deltas = self._streams.outbox(self._owner).deltas()
        if deltas is None:
            return
        begin = 0
        for index, stream_id in enumerate(deltas.stream_ids):
            end = begin + (deltas.num_tokens[index] if deltas.num_tokens else 1)
            tokens = self.tokens.setdefault(stream_id, [])
            assert deltas.first_positions[index] == len(tokens)
            tokens += deltas.token_ids[begin:end]
            begin = end
            self.texts[stream_id] = self.texts.get(stream_id, "") + deltas.texts[index]
            if deltas.finish_reasons and deltas.finish_reasons[index]:
                assert stream_id not in self.ends
                self.ends[stream_id] = deltas.finish_reasons[index]
            if deltas.num_cached_tokens:
                self.cached[stream_id] = deltas.num_cached_tokens[index]
        assert begin == len(deltas.token_ids)
        self._streams.mark_sent(self._owner)


def _ids(table: TokenTable, text: str) -> list[int]:
    return [table.pieces.index(bytes([byte])) for byte in text.encode()]


def _give(
    streams: StreamTable,
    position: int,
    token_ids: Sequence[int],
    finish: FinishReason = NONE,
    *,
    stream_id: int = STREAM,
    num_stop_tokens: int = 0,
    now_ns: int = 0,
    num_cached_tokens: int = 0,
) -> BatchEffects:
    batch = Batch([stream_id], [position], list(token_ids), [len(token_ids)], [finish], [num_stop_tokens], [num_cached_tokens])
    batch.check()
    return streams.apply(batch, source=SCHEDULER, now_ns=now_ns)


def _open(streams: StreamTable, *, owner: int = ROUTER, now_ns: int = 0, stream_id: int = STREAM, **start: object) -> BatchEffects:
    return streams.open(StreamStart(stream_id, **start), owner=owner, now_ns=now_ns)  # type: ignore[arg-type]


def test_duplicates_are_skipped_even_in_part(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    ids = _ids(table, "abcdef")
    _open(streams)
    _give(streams, 0, ids[:3])
    _give(streams, 1, ids[1:3])
    _give(streams, 2, ids[2:5])
    reader.read()
    assert (reader.texts[STREAM], reader.tokens[STREAM]) == ("abcde", ids[:5])
    assert _give(streams, 0, ids[:2]).owners == set()


def test_a_gap_is_told_once_then_again_after_the_repeat_time(streams: StreamTable, table: TokenTable) -> None:
    ids = _ids(table, "abcd")
    _open(streams)
    _give(streams, 0, ids[:1])
    assert _give(streams, 2, ids[2:3]).num_gaps == 1
    assert streams.outbox(ROUTER).gaps == {STREAM: 1}
    assert _give(streams, 3, ids[3:], now_ns=SECOND - 1).num_gaps == 0
    assert _give(streams, 3, ids[3:], now_ns=SECOND).num_gaps == 1
    reader = Reader(streams)
    _give(streams, 1, ids[1:])
    reader.read()
    assert reader.texts[STREAM] == "abcd"


def test_stop_tokens_count_but_make_no_text(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    ids = _ids(table, "ab")
    _open(streams)
    _give(streams, 0, [*ids, 0], STOP, num_stop_tokens=1, num_cached_tokens=9)
    reader.read()
    assert (reader.texts[STREAM], reader.tokens[STREAM], reader.ends[STREAM]) == ("ab", [*ids, 0], STOP)
    assert reader.cached[STREAM] == 9
    assert len(streams) == 0


def test_the_end_flushes_what_was_held_back(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    _open(streams, stops=["stop"])
    _give(streams, 0, [*_ids(table, "a sto"), table.pieces.index(b"\xc3")])
    reader.read()
    assert reader.texts[STREAM] == "a "
    _give(streams, 6, _ids(table, "sto"), LENGTH)
    reader.read()
    assert (reader.texts[STREAM], reader.ends[STREAM]) == ("a sto\N{REPLACEMENT CHARACTER}sto", LENGTH)


def test_an_end_without_tokens_ends_the_stream(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    _open(streams)
    _give(streams, 0, _ids(table, "ab"))
    _give(streams, 2, [], LENGTH)
    reader.read()
    assert (reader.texts[STREAM], reader.ends[STREAM]) == ("ab", LENGTH)


def test_a_stop_string_ends_the_stream_and_tells_the_scheduler(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    ids = _ids(table, "one stop two")
    _open(streams, stops=["stop"])
    effects = _give(streams, 0, ids)
    reader.read()
    assert effects.stops == {SCHEDULER: [STREAM]}
    # Only tokens up to the one that completed it count.
    assert (reader.texts[STREAM], reader.tokens[STREAM], reader.ends[STREAM]) == ("one ", ids[:8], STOP)
    # Steps that were under way are ignored; a scheduler that did not hear is told again later.
    assert _give(streams, 12, ids[:1], now_ns=SECOND - 1).stops == {}
    assert _give(streams, 13, ids[:1], now_ns=SECOND).stops == {SCHEDULER: [STREAM]}
    assert _give(streams, 14, [], LENGTH, now_ns=9 * SECOND).stops == {}
    reader.read()
    assert reader.texts[STREAM] == "one "


def test_a_stop_string_in_the_last_tokens_wins_over_the_length(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    _open(streams, stops=["b"], include_stop=True)
    effects = _give(streams, 0, _ids(table, "abc"), LENGTH)
    reader.read()
    # The scheduler ended it itself, so it is not told.
    assert effects.stops == {}
    assert (reader.texts[STREAM], reader.ends[STREAM]) == ("ab", STOP)


def test_tokens_before_their_stream_wait_for_it(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    _give(streams, 0, _ids(table, "ab"))
    _give(streams, 2, _ids(table, "c"), LENGTH)
    assert (streams.num_pending, reader.texts) == (1, {})
    assert _open(streams).owners == {ROUTER}
    reader.read()
    assert (reader.texts[STREAM], reader.ends[STREAM], streams.num_pending) == ("abc", LENGTH, 0)


def test_waiting_tokens_are_bounded_by_age_and_number(streams: StreamTable, table: TokenTable) -> None:
    ids = _ids(table, "abcdefgh")
    _give(streams, 0, ids, stream_id=1)
    _give(streams, 0, ids, stream_id=2, now_ns=SECOND)
    assert _give(streams, 0, ids, stream_id=3, now_ns=2 * SECOND).num_evicted == 1
    assert streams.num_pending == 2
    assert streams.expire(now_ns=31 * SECOND) == 0
    assert streams.expire(now_ns=31 * SECOND + 1) == 1
    # Thrown out is not lost: the next tokens show the gap.
    _open(streams, stream_id=1)
    assert _give(streams, 8, ids[:1], stream_id=1).num_gaps == 1
    assert streams.outbox(ROUTER).gaps == {1: 0}


def test_late_tokens_of_a_closed_stream_are_not_kept(streams: StreamTable, table: TokenTable) -> None:
    _open(streams)
    assert streams.close([STREAM, 999], owner=ROUTER) == [STREAM]
    _give(streams, 0, _ids(table, "a"))
    _give(streams, 0, _ids(table, "a"), stream_id=999)
    assert (len(streams), streams.num_pending, streams.outbox(ROUTER).is_empty) == (0, 0, True)


def test_a_router_cannot_close_another_routers_stream(streams: StreamTable) -> None:
    _open(streams)
    assert streams.close([STREAM], owner=OTHER_ROUTER) == []
    assert len(streams) == 1


def test_a_lost_routers_streams_are_closed_and_no_others(streams: StreamTable, table: TokenTable) -> None:
    _open(streams)
    _open(streams, stream_id=5, owner=OTHER_ROUTER)
    _give(streams, 0, _ids(table, "a"))
    assert streams.close_owner(ROUTER) == [STREAM]
    assert streams.unsent_owners() == []
    assert len(streams) == 1


def test_streams_of_several_routers_go_to_their_own(streams: StreamTable, table: TokenTable) -> None:
    readers = {owner: Reader(streams, owner) for owner in (ROUTER, OTHER_ROUTER)}
    for stream_id in range(6):
        _open(streams, stream_id=stream_id, owner=1 + stream_id % 2)
    ids = _ids(table, "abcdef")
    effects = streams.apply(Batch(range(6), [0] * 6, ids), source=SCHEDULER, now_ns=0)
    assert effects.owners == {ROUTER, OTHER_ROUTER}
    for reader in readers.values():
        reader.read()
    assert readers[ROUTER].texts == {0: "a", 2: "c", 4: "e"}
    assert readers[OTHER_ROUTER].texts == {1: "b", 3: "d", 5: "f"}


def test_too_many_streams_are_refused_with_an_error(table: TokenTable) -> None:
    streams = StreamTable(table, StreamLimits(streams_max=1))
    reader = Reader(streams)
    _open(streams)
    with pytest.raises(OverloadedError, match="1 streams are open"):
        _open(streams, stream_id=2)
    streams.refuse(2, owner=ROUTER)
    reader.read()
    assert reader.ends == {2: ERROR}
    assert len(streams) == 1


def test_a_history_shorter_than_it_claims_is_refused_with_an_error(streams: StreamTable) -> None:
    reader = Reader(streams)
    with pytest.raises(ProtocolError, match="num_output_tokens is 3 but the history has 1"):
        _open(streams, history=[1], num_output_tokens=3)
    streams.refuse(STREAM, owner=ROUTER)
    reader.read()
    assert reader.ends == {STREAM: ERROR}


@pytest.mark.parametrize(
    "batch",
    [
        Batch([1, 2], [0], [5, 6]),
        Batch([1, 2], [0, 0], [5]),
        Batch([1], [0], [5, 6], num_tokens=[3]),
        Batch([1, 2], [0, 0], [5, 6], finish_reasons=[NONE]),
        Batch([1, 2], [0, 0], [5, 6], num_stop_tokens=[1, 0, 0]),
        Batch([1, 2], [0, 0], [5, 6], num_cached_tokens=[1]),
    ],
)
def test_arrays_of_contradicting_lengths_are_refused(batch: Batch) -> None:
    with pytest.raises(ProtocolError, match="token batch"):
        batch.check()


def test_a_router_that_does_not_read_costs_a_bounded_amount_and_loses_nothing(streams: StreamTable, table: TokenTable) -> None:
    # Method: fail every send until the stream is rewound, then let the router read and have the scheduler send again as asked.
    reader = Reader(streams)
    ids = _ids(table, "größe, größer, am größten")
    _open(streams, stops=["größte!"])
    num_rewound = 0
    for position, token_id in enumerate(ids):
        _give(streams, position, [token_id], now_ns=position)
        num_rewound += streams.mark_unsent(ROUTER)
        deltas = streams.outbox(ROUTER).deltas()
        assert deltas is not None
        assert len(deltas.token_ids) <= 1 + 4
    assert num_rewound == 1
    gaps = dict(streams.outbox(ROUTER).gaps)
    reader.read()
    assert gaps == {STREAM: len(reader.tokens[STREAM])}
    _give(streams, gaps[STREAM], ids[gaps[STREAM] :], LENGTH, now_ns=SECOND)
    reader.read()
    assert (reader.texts[STREAM], reader.tokens[STREAM]) == ("größe, größer, am größten", ids)


def test_a_finished_stream_is_never_rewound(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    _open(streams)
    _give(streams, 0, _ids(table, "a"))
    streams.mark_unsent(ROUTER)
    _give(streams, 1, _ids(table, "bcdefgh"), LENGTH)
    assert streams.mark_unsent(ROUTER) == 0
    reader.read()
    assert (reader.texts[STREAM], reader.ends[STREAM]) == ("abcdefgh", LENGTH)


text_ids = st.lists(st.integers(0, 255 + 9 + 3), max_size=30)


@given(
    ids=text_ids,
    prompt=st.lists(st.integers(0, 255), max_size=4),
    stops=st.lists(st.text("ehlo w", min_size=1, max_size=4), max_size=2),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_a_stream_goes_on_elsewhere_exactly(
    tables_by_kind: dict[str, TokenTable], ids: list[int], prompt: list[int], stops: list[str], data: st.DataObject
) -> None:
    # Goal: a detokenizer may die at any point. Method: read a stream from one table; at a random point, after the router got only a
    # part of the text, open it in a new table from the history, and compare with a stream that was never moved.
    table = tables_by_kind["byte_level"]

    def begin() -> tuple[StreamTable, Reader]:
        streams = StreamTable(table, StreamLimits())
        streams.open(StreamStart(STREAM, stops=stops, history=prompt), owner=ROUTER, now_ns=0)
        return streams, Reader(streams)

    whole, reader = begin()
    _give(whole, 0, ids, LENGTH)
    reader.read()

    first, former = begin()
    cut = data.draw(st.integers(0, len(ids)))
    _give(first, 0, ids[:cut])
    former.read()
    former_text = former.texts.get(STREAM, "")
    if STREAM in former.ends:
        assert (former_text, former.ends) == (reader.texts[STREAM], reader.ends)
        return
    num_sent_chars = data.draw(st.integers(0, len(former_text)))
    second = StreamTable(table, StreamLimits())
    start = StreamStart(STREAM, stops=stops, history=[*prompt, *ids[:cut]], num_output_tokens=cut, num_sent_chars=num_sent_chars)
    second.open(start, owner=ROUTER, now_ns=0)
    _give(second, cut, ids[cut:], LENGTH)
    latter = Reader(second)
    latter.tokens[STREAM] = ids[:cut]
    latter.read()
    assert former_text[:num_sent_chars] + latter.texts[STREAM] == reader.texts[STREAM]
    assert (latter.tokens, latter.ends) == (reader.tokens, reader.ends)


@given(
    ids=text_ids,
    stops=st.lists(st.text("ehlo w", min_size=1, max_size=4), max_size=2),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_text_tokens_and_end_do_not_depend_on_the_batches(
    tables_by_kind: dict[str, TokenTable], ids: list[int], stops: list[str], cuts: list[int]
) -> None:
    results = []
    for borders in ([0, len(ids)], [0, *sorted({min(cut, len(ids)) for cut in cuts}), len(ids)]):
        streams = StreamTable(tables_by_kind["byte_level"], StreamLimits())
        reader = Reader(streams)
        streams.open(StreamStart(STREAM, stops=stops), owner=ROUTER, now_ns=0)
        for begin, end in pairwise(borders):
            _give(streams, begin, ids[begin:end], LENGTH if end == len(ids) else NONE)
            reader.read()
        results.append((reader.texts, reader.tokens, reader.ends))
    assert results[0] == results[1]


def test_beginning_again_after_a_gap_does_not_tell_the_same_gap_at_once(streams: StreamTable, table: TokenTable) -> None:
    reader = Reader(streams)
    ids = _ids(table, "abcdef")
    _open(streams)
    _give(streams, 0, ids[:1])
    reader.read()
    assert _give(streams, 2, ids[2:3]).num_gaps == 1
    _open(streams, history=ids[:1], num_output_tokens=1, num_sent_chars=1)
    # Sent before the scheduler was told to send again.
    assert _give(streams, 3, ids[3:4], now_ns=5).num_gaps == 0
    _give(streams, 1, ids[1:5], now_ns=6)
    reader.read()
    assert reader.texts[STREAM] == "abcde"
    # A new gap is news.
    assert _give(streams, 6, ids[5:], now_ns=7).num_gaps == 1
