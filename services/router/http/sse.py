"""Server-sent events, as far as the streams of our protocols use them. Pure."""

from __future__ import annotations

import orjson

HEADERS: list[tuple[bytes, bytes]] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies such as nginx would gather the chunks otherwise.
    (b"x-accel-buffering", b"no"),
]


def event(value: object) -> bytes:
    """One event with a JSON value."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(name: str, value: object) -> bytes:
    """One event with a name and a JSON value."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"
