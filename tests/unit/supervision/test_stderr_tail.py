from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.supervision.stderr_relay import (
    LINE_SIZE_MAX_BYTES,
    QUEUE_SIZE_MAX_BYTES,
    TAIL_SIZE_MAX_BYTES,
    StderrRelay,
    StderrTail,
)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=30))
def test_nothing_is_lost_and_the_last_lines_are_kept_however_the_output_is_cut(chunks):
    tail = StderrTail(5)
    passed = b"".join([*(tail.feed(chunk) for chunk in chunks), tail.flush()])
    written = b"".join(chunks)
    assert passed == (written if written.endswith(b"\n") or not written else written + b"\n")
    expected = passed.split(b"\n")[:-1][-5:]
    assert tail.lines == [line.decode("utf-8", "replace").rstrip("\r") for line in expected]


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"\n", b"a" * 10_000, b"b" * 70_000 + b"\n", b"\xff" * 300 + b"\n"]), max_size=40))
def test_what_is_kept_stays_within_its_bounds(chunks):
    tail = StderrTail(5)
    for chunk in chunks:
        tail.feed(chunk)
        assert len(tail.lines) <= 6
        assert sum(len(line) for line in tail.lines) <= TAIL_SIZE_MAX_BYTES + LINE_SIZE_MAX_BYTES


def test_two_children_never_share_a_line():
    one, other = StderrTail(5), StderrTail(5)
    assert one.feed(b"half of ") == b""
    assert other.feed(b"another line\nand") == b"another line\n"
    assert one.feed(b"a line\n") == b"half of a line\n"


def test_the_relay_never_blocks_and_tells_what_it_dropped():
    reading, writing = os.pipe()
    relay = StderrRelay(writing)
    line = b"y" * 9_999 + b"\n"
    for _ in range(2 * QUEUE_SIZE_MAX_BYTES // len(line)):
        relay.write(line)
    received = bytearray()
    while len(received) < QUEUE_SIZE_MAX_BYTES // 2:
        received += os.read(reading, 65536)
    relay.write(b"the end\n")
    while not received.endswith(b"the end\n"):
        received += os.read(reading, 65536)
    relay.close()
    os.close(writing)
    os.close(reading)
    assert b"bytes of stderr were dropped, as nobody read them in time\n" in received
    assert len(received) < 2 * QUEUE_SIZE_MAX_BYTES
    assert set(bytes(received).split(b"\n")[:10]) == {line[:-1]}
