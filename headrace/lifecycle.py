"""The states of a process life, shared by services, the supervisor, control messages and metrics.

    starting -> started -> ready <-> started
    any of these -> draining -> stopped
    any but the last two -> failed

`started` means: settings are good, sockets are bound, peers may dial. `ready` means: a request could be served now; a
process that loses what it needs falls back to `started`. `stopped` and `failed` are final. This table is pure data: who
sends a state where is told in headrace/supervision and headrace/wire.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a process is in its life; the value is the string used on every wire."""

    STARTING = "starting"
    STARTED = "started"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


LOADING = "loading the model: "
"""How the detail of `starting` begins while weights are read; a percentage follows."""

_ENDS = frozenset({State.DRAINING, State.STOPPED, State.FAILED})

TRANSITIONS: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.STARTED}) | _ENDS,
    State.STARTED: frozenset({State.READY}) | _ENDS,
    State.READY: frozenset({State.STARTED}) | _ENDS,
    State.DRAINING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}


def can_change(old: State, new: State) -> bool:
    """Whether a process in state `old` may say `new` next; saying the same state again is always allowed."""
    return new is old or new in TRANSITIONS[old]
