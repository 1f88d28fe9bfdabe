"""Sessions over the fake network: who knows whom, and until when."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import InvalidRequestError, OverloadedError, ReplicaDeadError
from headrace.v1.common_pb2 import Header, WorkHeader
from headrace.v1.control_pb2 import Register
from headrace.v1.router_pb2 import Accepted, RouterInbox
from headrace.v1.tokenizer_pb2 import Tokenize, TokenizeReply
from headrace.wire import topology
from headrace.wire.envelope import int32_array, int32_frame
from headrace.wire.fake import FakeNetwork, FakeWire
from headrace.wire.link import Peer
from headrace.wire.session import Leases

ADDRESS = "fake://router"


class Recorder:
    """A handler that remembers."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.lost: list[tuple[str, str]] = []
        self.messages: list[tuple[Peer, Any, list[memoryview]]] = []
        self.fail_with: Exception | None = None

    def on_peer(self, peer: Peer) -> None:
        self.peers.append(peer)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        self.lost.append((peer.instance, reason))

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        if self.fail_with is not None:
            raise self.fail_with
        self.messages.append((peer, message, frames))

    def on_heartbeat(self, peer: Peer) -> None:
        self.last_heartbeat = peer


def register(role: str, instance: str) -> Register:
    return Register(role=topology.ROLES[role], instance=instance)


def connect(network: FakeNetwork, role: str = "tokenizer", instance: str = "tokenizer-0") -> tuple[FakeWire, Recorder]:
    wire, recorder = network.wire(role, instance), Recorder()
    wire.dial(topology.ROUTER_BACKPLANE, [ADDRESS], recorder, register=lambda: register(role, instance))
    return wire, recorder


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


@pytest.fixture
def router(network: FakeNetwork) -> Recorder:
    recorder = Recorder()
    network.wire("router", "router-0").bind(topology.ROUTER_BACKPLANE, ADDRESS, recorder)
    return recorder


def test_dialling_process_registers_and_both_ends_can_send(network: FakeNetwork, router: Recorder) -> None:
    _, tokenizer = connect(network)
    network.settle()
    router.peers[0].send("tokenize", Tokenize(work=WorkHeader(request_id="r1"), text="hi"), [int32_frame([1, 2, 3])])
    tokenizer.peers[0].send("tokenize_reply", TokenizeReply(request_id="r1"), [int32_frame([7])])
    network.settle()
    _, message, frames = tokenizer.messages[0]
    assert message.tokenize.text == "hi"
    assert int32_array(frames[0], count=3).tolist() == [1, 2, 3]
    assert router.messages[0][1].tokenize_reply.request_id == "r1"


def test_silence_ends_the_acquaintance_on_both_ends(network: FakeNetwork, router: Recorder) -> None:
    wire, _ = connect(network)
    network.settle()
    wire.kill()
    network.advance(6)
    assert [instance for instance, _ in router.lost] == ["tokenizer-0"]
    with pytest.raises(ReplicaDeadError):
        router.peers[0].send("tokenize", Tokenize())


def test_a_paused_process_reads_what_its_peers_said_before_it_finds_them_silent(network: FakeNetwork) -> None:
    """Method: the router has the shorter lease, so that nobody else ends an acquaintance during its pause."""
    recorder, wire = Recorder(), network.wire("router", "router-0", Leases(lease_ns=3_000_000_000))
    wire.bind(topology.ROUTER_BACKPLANE, ADDRESS, recorder)
    _, living = connect(network)
    silent, _ = connect(network, instance="tokenizer-1")
    network.advance(1)
    wire.pause()
    network.advance(1)
    silent.pause()
    network.advance(3)
    wire.go_on()
    network.settle()
    assert not recorder.lost and not living.lost
    network.advance(4)
    assert [instance for instance, _ in recorder.lost] == ["tokenizer-1"]
    assert not living.lost


@pytest.mark.parametrize("role", ["tokenizer", "scheduler", "detokenizer"])
def test_a_front_that_was_lost_during_its_pause_lets_go_of_what_it_held_too(
    network: FakeNetwork, router: Recorder, role: str
) -> None:
    """Goal: both ends begin anew, once. Method: the front reads what its peer said before, then many a register."""
    _, back = connect(network, role, f"{role}-0")
    network.advance(1)
    network.fronts[ADDRESS].wire.pause()
    network.advance(6)
    assert len(back.lost) == 1
    network.fronts[ADDRESS].wire.go_on()
    network.advance(1)
    assert router.lost == [(f"{role}-0", "it had lost us")]
    assert [peer.is_alive for peer in router.peers] == [peer.is_alive for peer in back.peers] == [False, True]
    network.advance(20)
    assert len(router.peers) == len(back.peers) == 2


def test_a_register_that_is_repeated_changes_nothing(network: FakeNetwork, router: Recorder) -> None:
    network.fronts[ADDRESS].wire.pause()
    _, tokenizer = connect(network)
    network.advance(1)
    network.fronts[ADDRESS].wire.go_on()
    network.advance(1)
    assert len(router.peers) == len(tokenizer.peers) == 1
    assert not router.lost and not tokenizer.lost


def test_new_life_replaces_the_former_at_once(network: FakeNetwork, router: Recorder) -> None:
    wire, _ = connect(network)
    network.settle()
    wire.kill()
    connect(network)
    network.settle()
    assert router.lost == [("tokenizer-0", "replaced by a new life")]
    assert [peer.is_alive for peer in router.peers] == [False, True]


def test_restarted_front_is_noticed_and_registered_at_again(network: FakeNetwork, router: Recorder) -> None:
    _, tokenizer = connect(network)
    network.settle()
    network.fronts[ADDRESS].wire.kill()
    second = Recorder()
    network.wire("router", "router-0").bind(topology.ROUTER_BACKPLANE, ADDRESS, second)
    network.advance(1)
    assert [peer.instance for peer in second.peers] == ["tokenizer-0"]
    assert len(tokenizer.lost) == 1
    assert len(tokenizer.peers) == 2


def test_message_for_a_former_life_is_dropped(network: FakeNetwork, router: Recorder) -> None:
    _, tokenizer = connect(network)
    network.settle()
    front = network.fronts[ADDRESS]
    header = Header(protocol_version=1, sender_incarnation=tokenizer.peers[0].incarnation, recipient_incarnation=999)
    data = RouterInbox(header=header, tokenize_reply=TokenizeReply(request_id="old")).SerializeToString()
    front.session.receive(next(iter(front.connections)), [data], network.now_ns)
    assert router.messages == []


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"\x0a\x7f\x01"])
def test_truncated_frame_is_dropped_and_the_link_goes_on(network: FakeNetwork, router: Recorder, data: bytes) -> None:
    _, tokenizer = connect(network)
    network.settle()
    front = network.fronts[ADDRESS]
    front.session.receive(next(iter(front.connections)), [data], network.now_ns)
    tokenizer.peers[0].send("tokenize_reply", TokenizeReply(request_id="r1"))
    network.settle()
    assert len(router.messages) == 1


def test_arm_without_business_on_the_edge_is_refused(network: FakeNetwork, router: Recorder) -> None:
    _, tokenizer = connect(network)
    network.settle()
    tokenizer.peers[0].send("accepted", Accepted(request_id="r1"))
    network.settle()
    assert router.messages == []
    assert router.lost == []


def test_newer_protocol_version_is_refused_without_a_crash(network: FakeNetwork, router: Recorder) -> None:
    _, tokenizer = connect(network)
    network.settle()
    front = network.fronts[ADDRESS]
    header = Header(protocol_version=2, sender_incarnation=tokenizer.peers[0].incarnation)
    data = RouterInbox(header=header, tokenize_reply=TokenizeReply(request_id="new")).SerializeToString()
    front.session.receive(next(iter(front.connections)), [data], network.now_ns)
    network.settle()
    assert router.messages == []


def test_role_without_an_edge_cannot_register(network: FakeNetwork, router: Recorder) -> None:
    wire, recorder = network.wire("tokenizer", "worker-0"), Recorder()
    wire.dial(topology.ROUTER_BACKPLANE, [ADDRESS], recorder, register=lambda: register("worker", "worker-0"))
    network.settle()
    assert router.peers == []
    assert recorder.peers == []


def test_who_is_refused_is_told_and_asks_again_until_it_is_taken(network: FakeNetwork) -> None:
    recorder = Recorder()
    asked: list[str] = []

    def admit(register: Register) -> None:
        asked.append(register.instance)
        if len(asked) < 4:
            raise InvalidRequestError("no room for a tokenizer")

    front = network.wire("router", "router-0").bind(topology.ROUTER_BACKPLANE, ADDRESS, recorder, admit=admit)
    wire, tokenizer = connect(network)
    back = wire._backs[0]
    network.settle()
    assert back.refused_reason == "no room for a tokenizer"
    network.advance(1)
    assert not front.peers and not recorder.peers and not tokenizer.peers
    assert len(asked) <= 3, "about once a second"
    network.advance(5)
    assert len(recorder.peers) == len(tokenizer.peers) == 1
    assert (back.refused_reason, len(asked)) == ("", 4)
    assert not recorder.lost and not tokenizer.lost


def test_a_refusal_is_forgotten_when_the_front_is_gone(network: FakeNetwork) -> None:
    def admit(register: Register) -> None:
        raise InvalidRequestError("no room for a tokenizer")

    network.wire("router", "router-0").bind(topology.ROUTER_BACKPLANE, ADDRESS, Recorder(), admit=admit)
    wire, _ = connect(network)
    network.settle()
    network.fronts[ADDRESS].wire.kill()
    network.advance(2)
    assert not wire._backs[0].refused_reason


def test_full_queue_is_an_error_to_the_sender_and_touches_nobody_else(network: FakeNetwork, router: Recorder) -> None:
    connect(network)
    connect(network, instance="tokenizer-1")
    network.settle()
    network.full_towards.add("tokenizer-0")
    slow, quick = router.peers
    with pytest.raises(OverloadedError):
        slow.send("tokenize", Tokenize())
    quick.send("tokenize", Tokenize())


def test_failing_handler_loses_the_message_not_the_link(network: FakeNetwork, router: Recorder) -> None:
    _, tokenizer = connect(network)
    network.settle()
    router.fail_with = ZeroDivisionError()
    tokenizer.peers[0].send("tokenize_reply", TokenizeReply(request_id="r1"))
    network.settle()
    router.fail_with = None
    tokenizer.peers[0].send("tokenize_reply", TokenizeReply(request_id="r2"))
    network.settle()
    assert [message.tokenize_reply.request_id for _, message, _ in router.messages] == ["r2"]


def test_goodbye_ends_the_lease_at_once(network: FakeNetwork, router: Recorder) -> None:
    wire, _ = connect(network)
    network.settle()
    for back in wire._backs:
        back.close("stopped")
    network.settle()
    assert router.lost == [("tokenizer-0", "left: stopped")]


def test_ticks_at_due_times_alone_hold_an_acquaintance_and_end_it_in_time(network: FakeNetwork, router: Recorder) -> None:
    """Goal: nothing is missed between two ticks. Method: time leaps from one due time to the next, for a minute."""
    wire, tokenizer = connect(network)
    front, back = network.fronts[ADDRESS].session, wire._backs[0].connections[ADDRESS].session
    assert back.due_ns() is None, "nobody has accepted it: soon"
    network.settle()
    num_ticks = 0
    while network.now_ns < 60e9:
        due_ns = back.due_ns()
        assert due_ns is not None
        assert min(due_ns, front.due_ns()) > network.now_ns
        network.now_ns = min(due_ns, front.due_ns())
        network.settle()
        num_ticks += 1
    assert num_ticks <= 2 * 60 / 0.5 + 2, "each end's heartbeats, and no more"
    assert not router.lost and not tokenizer.lost
    last_heard_ns = tokenizer.peers[0].last_seen_ns
    network.fronts[ADDRESS].wire.kill()
    while (due_ns := back.due_ns()) is not None:
        network.now_ns = due_ns
        network.settle()
    assert tokenizer.lost
    assert network.now_ns == last_heard_ns + back.leases.lease_ns + 1


def test_all_links_of_a_process_beat_together(network: FakeNetwork, router: Recorder) -> None:
    """Goal: one look at what a process does, for all of its links. Method: they are made at different times."""
    wire, _ = connect(network)
    network.settle()
    network.now_ns += 123_456_789
    network.wire("router", "router-1").bind(topology.ROUTER_BACKPLANE, "fake://late", Recorder())
    wire.dial(topology.ROUTER_BACKPLANE, ["fake://late"], Recorder(), register=lambda: register("tokenizer", "tokenizer-0"))
    network.settle()
    first, late = (connection.session for back in wire._backs for connection in back.connections.values())
    for _ in range(3):
        due_ns = first.due_ns()
        assert due_ns is not None
        assert due_ns == late.due_ns()
        assert 0 < due_ns - network.now_ns <= Leases().heartbeat_ns
        assert due_ns != network.fronts[ADDRESS].session.due_ns(), "each process at times of its own"
        network.now_ns = due_ns
        network.settle()
