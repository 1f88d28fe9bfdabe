from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ProtocolError
from headrace.lifecycle import State
from headrace.supervision.notification import (
    DETAIL_LENGTH_MAX,
    NOTIFICATION_SIZE_MAX_BYTES,
    NUM_COUNTERS_MAX,
    Notification,
    decode_notification,
    encode_notification,
)

counters = st.dictionaries(
    st.text(max_size=20), st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False), max_size=8
)


@settings(deadline=None)
@given(
    state=st.none() | st.sampled_from(State),
    detail=st.text(max_size=3000),
    progress=st.none() | counters,
    is_busy=st.booleans(),
)
def test_what_is_encoded_is_decoded_again(state, detail, progress, is_busy):
    sent = Notification(state, detail, progress, is_busy and progress is not None)
    data = encode_notification(sent)
    assert decode_notification(data) == Notification(state, detail[:DETAIL_LENGTH_MAX], progress, sent.is_busy)


def test_unknown_keys_are_left_alone():
    assert decode_notification(b'{"state":"ready","mood":"good"}').state is State.READY


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 10_000, "not JSON"),
        (b"[]", "must be a JSON object, got list"),
        (b'{"state":"happy"}', "one of starting, started, ready, draining, stopped, failed, got 'happy'"),
        (b'{"state":7}', "got '7'"),
        (b'{"detail":1}', "detail must be a string"),
        (b'{"is_busy":1}', "is_busy a boolean"),
        (b'{"progress":[]}', "must be an object"),
        (b'{"progress":{"n":"many"}}', "'n' must be a finite number, got many"),
        (b'{"progress":{"n":true}}', "must be a finite number"),
        (b'{"progress":{"n":NaN}}', "must be a finite number"),
        (json.dumps({"progress": {str(n): n for n in range(NUM_COUNTERS_MAX + 1)}}).encode(), "at most 32 counters"),
        (b" " * (NOTIFICATION_SIZE_MAX_BYTES + 1), "at most 16384 bytes, got 16385"),
    ],
)
def test_a_bad_notification_is_refused_with_its_reason(data, says):
    with pytest.raises(ProtocolError, match=says):
        decode_notification(data)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_protocol_error(data):
    try:
        decode_notification(data)
    except ProtocolError as error:
        assert error.message
