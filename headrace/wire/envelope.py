"""Bytes of a message: one protobuf inbox in the first frame, large arrays in further frames.

An inbox is sealed by concatenation: the header's field and the body's field are serialised apart and joined, which protobuf
defines to be the same message. So a body is never copied into an envelope object.

Source: Protocol Buffers encoding, "Last One Wins" (concatenation merges).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from headrace.errors import ProtocolError
from headrace.v1.common_pb2 import Header
from headrace.wire.topology import PROTOCOL_VERSION

Frame = bytes | memoryview | npt.NDArray[np.int32]

_LENGTH_DELIMITED = 2


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_HEADER_TAG = _varint(1 << 3 | _LENGTH_DELIMITED)
_ARM_TAGS: dict[tuple[type[Message], str], bytes] = {}


def _arm_tag(inbox_class: type[Message], arm: str) -> bytes:
    key = (inbox_class, arm)
    tag = _ARM_TAGS.get(key)
    if tag is None:
        field = inbox_class.DESCRIPTOR.fields_by_name.get(arm)
        if field is None:
            raise ProtocolError(f"{inbox_class.DESCRIPTOR.name} has no arm {arm!r}")
        tag = _ARM_TAGS[key] = _varint(field.number << 3 | _LENGTH_DELIMITED)
    return tag


def seal(
    inbox_class: type[Message],
    arm: str,
    body: Message,
    *,
    sender_incarnation: int,
    recipient_incarnation: int,
    sent_unix_ns: int,
) -> bytes:
    """Serialise `body` as arm `arm` of the recipient's inbox."""
    header = Header(
        protocol_version=PROTOCOL_VERSION,
        sender_incarnation=sender_incarnation,
        recipient_incarnation=recipient_incarnation,
        sent_unix_ns=sent_unix_ns,
    ).SerializeToString()
    payload = body.SerializeToString()
    return b"".join((_HEADER_TAG, _varint(len(header)), header, _arm_tag(inbox_class, arm), _varint(len(payload)), payload))


def unseal(inbox_class: type[Message], data: bytes | memoryview) -> Any:
    """Parse an inbox message.

    Raises:
        ProtocolError: The bytes are no such message, or the header is missing.
    """
    message: Any = inbox_class()
    try:
        message.ParseFromString(bytes(data))
    except DecodeError as error:
        raise ProtocolError(f"{inbox_class.DESCRIPTOR.name}: {len(data)} bytes cannot be parsed ({error})") from error
    if message.header.sender_incarnation == 0:
        raise ProtocolError(f"{inbox_class.DESCRIPTOR.name}: no sender incarnation in the header")
    return message


def int32_frame(values: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Token ids as a frame: little-endian int32, shape [n]. No copy when they are that already."""
    return np.ascontiguousarray(values, dtype="<i4")


def int32_array(frame: bytes | memoryview | None, *, count: int | None = None) -> npt.NDArray[np.int32]:
    """A frame as little-endian int32, shape [n], without a copy.

    Raises:
        ProtocolError: The frame is missing, not a multiple of four bytes, or does not hold `count` values.
    """
    if frame is None or len(frame) % 4:
        raise ProtocolError(f"a frame of int32 values has {'no' if frame is None else len(frame)} bytes")
    array = np.frombuffer(frame, dtype="<i4")
    if count is not None and len(array) != count:
        raise ProtocolError(f"a frame of int32 values holds {len(array)}, {count} were announced")
    return array


def float32_array(frame: bytes | memoryview | None, *, count: int) -> npt.NDArray[np.float32]:
    """A frame as little-endian float32, shape [n], without a copy.

    Raises:
        ProtocolError: The frame is missing or does not hold `count` values.
    """
    num_bytes = 0 if frame is None else len(frame)
    if frame is None or num_bytes != 4 * count:
        raise ProtocolError(f"a frame of float32 values has {num_bytes} bytes, {count} values were announced")
    return np.frombuffer(frame, dtype="<f4")


def frame_bytes(frame: Frame) -> bytes | memoryview:
    """What the socket takes: bytes or a byte view of an array."""
    if isinstance(frame, np.ndarray):
        return np.ascontiguousarray(frame).data.cast("B") if frame.size else b""
    return frame
