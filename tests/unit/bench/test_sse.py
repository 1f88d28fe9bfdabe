"""The SSE parser: what is an event, and that it does not matter where the bytes are split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.sse import SseError, SseEvent, SseParser

STREAM = (
    b"\xef\xbb\xbf: hello\n\ndata: one\n\ndata:two\ndata: lines\n\nevent: error\r\ndata: bad\r\n\r\n"
    b"id: 7\nretry: 100\n\nevent: lonely\n\ndata\n\ndata:  spaced \n\rdata: caf\xc3\xa9: x\r\r: ping\r\n\ndata: [DONE]\n\n"
)
EVENTS = [
    SseEvent(b"one"),
    SseEvent(b"two\nlines"),
    SseEvent(b"bad", "error"),
    SseEvent(b""),
    SseEvent(b" spaced "),
    SseEvent(b"caf\xc3\xa9: x"),
    SseEvent(b"[DONE]"),
]


def parse(pieces: list[bytes]) -> list[SseEvent]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_every_kind_of_line_is_read_as_the_grammar_says() -> None:
    assert parse([STREAM]) == EVENTS


@pytest.mark.parametrize("at", range(len(STREAM) + 1))
def test_a_split_at_any_byte_changes_nothing(at: int) -> None:
    assert parse([STREAM[:at], STREAM[at:]]) == EVENTS


def test_single_bytes_give_the_same_events() -> None:
    assert parse([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(
    text=st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"data: a", b"data", b": c", b"event: e", b"x", b"\xef\xbb\xbf"])).map(
        b"".join
    ),
    cuts=st.sets(st.integers(min_value=0, max_value=200)),
)
def test_any_text_split_anyhow_gives_the_events_of_the_whole(text: bytes, cuts: set[int]) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert parse(pieces) == parse([text])


# The alphabet holds what str.splitlines takes for a line end and the event stream does not.
@given(
    lines=st.lists(st.text("a :\t\x0b\x0c\x1c\x85\u2028é€😀", max_size=8), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_data_lines_come_back_as_they_were_written(lines: list[str], end: str) -> None:
    written = "".join(f"data: {line}{end}" for line in lines) + end
    assert parse([written.encode()]) == [SseEvent("\n".join(lines).encode())]


def test_an_event_without_its_blank_line_is_not_delivered_but_is_noticed() -> None:
    parser = SseParser()
    assert parser.feed(b"data: whole\n\ndata: half\n") == [SseEvent(b"whole")]
    assert parser.is_inside_event
    assert parser.feed(b"\n") == [SseEvent(b"half")]
    assert not parser.is_inside_event


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 200, b"data: xxxxxxx\n" * 20])
def test_an_event_over_the_limit_is_an_error_before_it_ends(piece: bytes) -> None:
    with pytest.raises(SseError, match="100 bytes"):
        SseParser(event_bytes_max=100).feed(piece)


def test_many_events_together_may_exceed_the_limit_of_one() -> None:
    assert len(SseParser(event_bytes_max=100).feed(b"data: xxxxxxx\n\n" * 100)) == 100
