from __future__ import annotations

import socket

from headrace.lifecycle import State
from headrace.supervision.child import SUPERVISION_VARIABLES, Notifier
from headrace.supervision.notification import decode_notification


def test_a_full_channel_neither_blocks_nor_loses_the_state():
    """Goal: a stuck supervisor stalls no child. Method: nobody reads until the socket is full, then everything is read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    notifier = Notifier(theirs)
    number = 0
    while notifier.num_dropped == 0:
        number += 1
        notifier.progress({"n": number})
    notifier.state(State.READY)
    ours.setblocking(False)
    received = []
    for _ in range(10_000):
        try:
            received.append(decode_notification(ours.recv(65536)))
        except BlockingIOError:
            break
    assert State.READY not in {one.state for one in received}
    notifier.progress({"n": -1})
    assert decode_notification(ours.recv(65536)).state is State.READY
    assert decode_notification(ours.recv(65536)).progress == {"n": -1}
    notifier.close()
    ours.close()


def test_a_dead_supervisor_and_a_closed_channel_raise_nothing():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    notifier = Notifier(theirs)
    ours.close()
    notifier.state(State.READY)
    notifier.progress({})
    assert notifier.num_dropped == 1
    notifier.close()
    notifier.state(State.STOPPED)
    notifier.progress({})


def test_every_variable_is_known_to_the_config_loader():
    assert {name.removeprefix("HEADRACE_") for name in SUPERVISION_VARIABLES} == {
        "LIFELINE_FD",
        "NOTIFY_FD",
        "STANDBY_FD",
        "SUPERVISOR_PID",
        "RUN_DIRECTORY",
        "SUPERVISION_MARK",
    }
