"""What a supervised process tells its supervisor: one JSON object a datagram, both ways of it in one place. Pure.

    {"state": "ready", "detail": "router 127.0.0.1:8000"}
    {"progress": {"num_steps": 512}, "is_busy": true}

Unknown keys are left alone, so an older supervisor runs a newer child. Sizes are bounded on both sides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.errors import ProtocolError
from headrace.lifecycle import State

NOTIFICATION_SIZE_MAX_BYTES = 16 * 1024
DETAIL_LENGTH_MAX = 2000
NUM_COUNTERS_MAX = 32


@dataclass(frozen=True)
class Notification:
    """A state change, a progress report, or both."""

    state: State | None = None
    detail: str = ""
    progress: Mapping[str, float] | None = field(default=None)
    """Counters that change when work gets done; their names are the sender's own. None: no progress report."""
    is_busy: bool = False
    """Whether work is waiting or running, so that the counters ought to change."""


def encode_notification(notification: Notification) -> bytes:
    """The datagram for `notification`; a long detail is cut."""
    message: dict[str, object] = {}
    if notification.state is not None:
        message["state"] = notification.state.value
    if notification.detail:
        message["detail"] = notification.detail[:DETAIL_LENGTH_MAX]
    if notification.progress is not None:
        message["progress"] = dict(notification.progress)
        message["is_busy"] = notification.is_busy
    return json.dumps(message, separators=(",", ":")).encode()


def decode_notification(data: bytes) -> Notification:
    """Read a datagram.

    Raises:
        ProtocolError: It is no JSON object, too long, or a member has a wrong type or an unknown state.
    """
    if len(data) > NOTIFICATION_SIZE_MAX_BYTES:
        raise ProtocolError(f"a notification has at most {NOTIFICATION_SIZE_MAX_BYTES} bytes, got {len(data)} or more")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a notification is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a notification must be a JSON object, got {type(message).__name__}")
    detail, is_busy = message.get("detail", ""), message.get("is_busy", False)
    if not isinstance(detail, str) or not isinstance(is_busy, bool):
        raise ProtocolError("a notification's detail must be a string and its is_busy a boolean")
    return Notification(_state_of(message), detail[:DETAIL_LENGTH_MAX], _progress_of(message), is_busy)


def _state_of(message: dict[str, object]) -> State | None:
    name = message.get("state")
    if name is None:
        return None
    try:
        return State(str(name))
    except ValueError as error:
        text = f"a notification's state must be one of {', '.join(State)}, got {str(name)[:80]!r}"
        raise ProtocolError(text, param="state") from error


def _progress_of(message: dict[str, object]) -> dict[str, float] | None:
    progress = message.get("progress")
    if progress is None:
        return None
    if not isinstance(progress, dict) or len(progress) > NUM_COUNTERS_MAX:
        raise ProtocolError(f"a notification's progress must be an object of at most {NUM_COUNTERS_MAX} counters", param="progress")
    for name, value in progress.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ProtocolError(f"progress counter {name[:80]!r} must be a finite number, got {str(value)[:80]}", param="progress")
    return progress
