"""The acquaintance of two processes, free of sockets and clocks: register, heartbeat, lease, drain, goodbye.

A front session sits on one bound address and keeps a table of registered peers; a back session sits on one dialled connection and
knows one front. Both take the parts of a message and a time, and send through a callable that either queues the parts or raises.
What the two ends hold of each other dies by goodbye, by a lease that runs out, when a newer life of the same instance appears, or
when the one that dials lost the other and registers anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from google.protobuf.message import Message

from headrace.errors import HeadraceError, OverloadedError, ProtocolError, ReplicaDeadError
from headrace.telemetry.metrics import WireMetrics
from headrace.v1.common_pb2 import ErrorDetail, ModelInfo
from headrace.v1.control_pb2 import Capacity, Drain, Goodbye, Heartbeat, Load, Progress, Register, Registered, Unsupported
from headrace.wire.envelope import Frame, frame_bytes, seal, unseal
from headrace.wire.topology import CONTROL_ARMS, INBOXES, PROTOCOL_VERSION, ROLE_NAMES, Backplane, Edge

Parts = Sequence[bytes | memoryview]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is: role name, stable instance name, and this life's number."""

    role: str
    instance: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Leases:
    """Times of the acquaintance, nanoseconds."""

    heartbeat_ns: int = 500_000_000
    lease_ns: int = 5_000_000_000
    register_ns: int = 100_000_000


class Handler(Protocol):
    """What a service gives to a link. Called on the event loop; must not block."""

    def on_peer(self, peer: Peer) -> None:
        """A peer registered (front side) or accepted us (back side)."""

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A peer's life, or our acquaintance with it, is over. It can be sent nothing any more."""

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """A work message of a registered peer; `message` is an inbox of our own role."""

    def on_heartbeat(self, peer: Peer) -> None:
        """The peer's load, progress, draining flag or models may have changed."""


class Peer:
    """One registered process life at the other end of one link."""

    def __init__(
        self, edge: Edge, role: str, instance: str, incarnation: int, send: Callable[[Peer, str, Message, Parts], None]
    ) -> None:
        self.edge = edge
        self.role = role
        self.instance = instance
        self.incarnation = incarnation
        self.routing_id = b""
        self.address = ""
        self.models: tuple[ModelInfo, ...] = ()
        self.capacity: Capacity | None = None
        self.load = Load()
        self.progress = Progress()
        self.is_draining = False
        self.num_lanes = 0
        self.last_seen_ns = 0
        self.is_alive = True
        # It has said something after it registered, so it knows that it was accepted.
        self.has_answered = False
        self._send = send

    def __repr__(self) -> str:
        return f"<Peer {self.instance} {self.incarnation:016x}>"

    def send(self, arm: str, body: Message, frames: Iterable[Frame] = ()) -> None:
        """Queue a message; never blocks.

        Raises:
            OverloadedError: The queue towards this peer is full.
            ReplicaDeadError: The peer is lost.
        """
        if not self.is_alive:
            raise ReplicaDeadError(f"{self.instance} is gone")
        self._send(self, arm, body, [frame_bytes(frame) for frame in frames])


class Session:
    """What both ends share: sealing, checking, counting."""

    def __init__(
        self, identity: Identity, handler: Handler, metrics: WireMetrics, leases: Leases, unix_ns: Callable[[], int]
    ) -> None:
        self.identity = identity
        self.handler = handler
        self.metrics = metrics
        self.leases = leases
        self.load = Load()
        self.progress = Progress()
        self.models: tuple[ModelInfo, ...] = ()
        self.is_draining = False
        self._unix_ns = unix_ns
        self._inbox_class = INBOXES[identity.role]
        self._logged: set[str] = set()
        self._ticked_ns = 0

    def excuse(self, peers: Iterable[Peer], now_ns: int) -> None:
        """Give peers a moment more where this process has not run for half a lease: what they said meanwhile lies unread."""
        if now_ns - self._ticked_ns > self.leases.lease_ns // 2:
            for peer in peers:
                peer.last_seen_ns = max(peer.last_seen_ns, now_ns - self.leases.lease_ns + 2 * self.leases.heartbeat_ns)
        self._ticked_ns = now_ns

    def next_beat_ns(self, now_ns: int) -> int:
        """When the next heartbeat is due: all links of a process beat together, each process at times of its own."""
        interval_ns = self.leases.heartbeat_ns
        return now_ns + interval_ns - (now_ns - self.identity.incarnation) % interval_ns

    def heartbeat(self) -> Heartbeat:
        """What the next heartbeat says."""
        return Heartbeat(load=self.load, progress=self.progress, draining=self.is_draining, models=self.models)

    def seal(self, edge: Edge, to_role: str, arm: str, body: Message, recipient: int) -> bytes:
        """Bytes of a message to a role, counted."""
        data = seal(
            INBOXES[to_role],
            arm,
            body,
            sender_incarnation=self.identity.incarnation,
            recipient_incarnation=recipient,
            sent_unix_ns=self._unix_ns(),
        )
        self.metrics.count(edge.name, "out", arm, len(data))
        return data

    def parse(self, edge_name: str, parts: Parts) -> Any | None:
        """The message of the first part, or None when it is unreadable, which is counted."""
        try:
            message = unseal(self._inbox_class, parts[0])
        except ProtocolError as error:
            self.drop(edge_name, "undecodable", str(error))
            return None
        return message

    def drop(self, edge_name: str, reason: str, detail: str = "") -> None:
        """Count a message that is not handled; the first of each kind is logged."""
        self.metrics.dropped.labels(edge_name, reason).inc()
        if (key := f"{edge_name}:{reason}") not in self._logged:
            self._logged.add(key)
            log.warning("message.dropped", edge=edge_name, reason=reason, detail=detail)

    def refusal(self, message: Any, arms: frozenset[str]) -> str | None:
        """Why a parsed message cannot be handled: a newer version, an unknown arm, or one that has no business on this edge."""
        if message.header.protocol_version != PROTOCOL_VERSION:
            return f"protocol version {message.header.protocol_version}, {PROTOCOL_VERSION} is spoken here"
        arm = message.WhichOneof("body")
        if arm is None:
            return "unknown message kind"
        if arm not in CONTROL_ARMS and arm not in arms:
            return f"{arm} is not taken on this link"
        return None

    def deliver(self, peer: Peer, message: Any, arm: str, parts: Parts) -> None:
        """Hand a work message to the service: the one per-message boundary. A failing handler loses the message, not the link."""
        self.metrics.count(peer.edge.name, "in", arm, sum(map(len, parts)))
        try:
            self.handler.on_message(peer, message, [memoryview(part) for part in parts[1:]])
        except HeadraceError as error:
            self.drop(peer.edge.name, error.code, error.message)
            self.reply_unsupported(peer, f"{arm}: {error.message}")
        except Exception as error:
            log.exception("message.failed", edge=peer.edge.name, arm=arm, peer=peer.instance)
            self.drop(peer.edge.name, "handler_error", repr(error))
            self.reply_unsupported(peer, f"{arm}: internal error")

    def reply_unsupported(self, peer: Peer, reason: str) -> None:
        """Tell a registered peer that its message was not handled; a full queue loses the remark, not the peer."""
        try:
            peer.send("unsupported", Unsupported(reason=reason))
        except (OverloadedError, ReplicaDeadError):
            self.metrics.overloads.labels(peer.edge.name).inc()


class FrontSession(Session):
    """The bound end: many peers, told apart by the routing ids of their connections."""

    def __init__(
        self,
        identity: Identity,
        backplane: Backplane,
        handler: Handler,
        *,
        send: Callable[[bytes, Parts], None],
        metrics: WireMetrics,
        leases: Leases,
        unix_ns: Callable[[], int],
        admit: Callable[[Register], None] | None = None,
    ) -> None:
        super().__init__(identity, handler, metrics, leases, unix_ns)
        self.backplane = backplane
        self.peers: dict[int, Peer] = {}
        self.num_lanes = 0
        self._by_routing_id: dict[bytes, Peer] = {}
        self._send = send
        self._admit = admit
        self._next_heartbeat_ns = 0

    def receive(self, routing_id: bytes, parts: Parts, now_ns: int) -> None:
        """Take one message."""
        peer = self._by_routing_id.get(routing_id)
        edge_name = peer.edge.name if peer else self.backplane.name
        message = self.parse(edge_name, parts)
        if message is None:
            return
        header = message.header
        if header.recipient_incarnation not in (0, self.identity.incarnation):
            self.drop(edge_name, "former_life")
            self._answer_stranger(routing_id, message, "the message is for a former life", register_again=True)
            return
        refusal = self.refusal(message, peer.edge.to_front if peer else frozenset())
        arm = message.WhichOneof("body")
        if arm == "register" and header.protocol_version == PROTOCOL_VERSION:
            self._on_register(routing_id, header.sender_incarnation, message.register, now_ns)
        elif peer is None or peer.incarnation != header.sender_incarnation:
            self.drop(edge_name, "unregistered")
            self._answer_stranger(routing_id, message, "not registered here", register_again=True)
        elif refusal is not None:
            self.drop(edge_name, "unsupported", refusal)
            self.reply_unsupported(peer, refusal)
        else:
            peer.last_seen_ns = now_ns
            peer.has_answered = True
            self._dispatch(peer, message, arm, parts)

    def tick(self, now_ns: int) -> None:
        """Expire leases; heartbeat every registered peer when it is time. Call it at `due_ns`, or before."""
        self.excuse(self.peers.values(), now_ns)
        for peer in [p for p in self.peers.values() if now_ns - p.last_seen_ns > self.leases.lease_ns]:
            self.lose(peer, f"not heard of for {self.leases.lease_ns / 1e9:g} s")
        if now_ns < self._next_heartbeat_ns:
            return
        self._next_heartbeat_ns = self.next_beat_ns(now_ns)
        beat = self.heartbeat()
        for peer in list(self.peers.values()):
            try:
                peer.send("heartbeat", beat)
            except OverloadedError:
                # It does not read; its lease will tell.
                self.metrics.overloads.labels(peer.edge.name).inc()
            except ReplicaDeadError as error:
                self.lose(peer, error.message)

    def due_ns(self) -> int:
        """When `tick` has something to do next, unless something is heard before."""
        expiries = (peer.last_seen_ns + self.leases.lease_ns + 1 for peer in self.peers.values())
        return min((self._next_heartbeat_ns, *expiries))

    def goodbye(self, reason: str) -> None:
        """Tell every peer that this life ends."""
        for peer in list(self.peers.values()):
            try:
                peer.send("goodbye", Goodbye(reason=reason))
            except (OverloadedError, ReplicaDeadError):
                # It will learn by its lease.
                self.metrics.overloads.labels(peer.edge.name).inc()

    def lose(self, peer: Peer, reason: str) -> None:
        """Forget a peer and tell the service."""
        if self.peers.get(peer.incarnation) is not peer:
            return
        del self.peers[peer.incarnation]
        self._by_routing_id.pop(peer.routing_id, None)
        peer.is_alive = False
        self.metrics.peers.labels(peer.edge.name, peer.role).dec()
        log.info("peer.lost", peer=peer.instance, role=peer.role, reason=reason)
        self.handler.on_peer_lost(peer, reason)

    def _dispatch(self, peer: Peer, message: Any, arm: str, parts: Parts) -> None:
        if arm not in CONTROL_ARMS:
            self.deliver(peer, message, arm, parts)
        elif arm == "heartbeat":
            _take_heartbeat(peer, message.heartbeat)
            self.handler.on_heartbeat(peer)
        elif arm == "drain":
            peer.is_draining = True
            self.handler.on_heartbeat(peer)
        elif arm == "goodbye":
            self.lose(peer, f"left: {message.goodbye.reason}")
        elif arm == "unsupported":
            log.warning("peer.refused_message", peer=peer.instance, reason=message.unsupported.reason)

    def _on_register(self, routing_id: bytes, incarnation: int, register: Register, now_ns: int) -> None:
        role = ROLE_NAMES.get(register.role, "")
        edge = self.backplane.edge_from(role)
        if edge is None or not register.instance:
            reason = f"role {register.role} named {register.instance!r} has no business here"
            self._refuse(routing_id, self.backplane.edges[0], incarnation, ProtocolError(reason))
            return
        answer = Registered(instance=self.identity.instance, num_lanes=self.num_lanes, inquiry=register.inquiry)
        if register.inquiry:
            self._send_registered(routing_id, edge, incarnation, answer)
            return
        known = self.peers.get(incarnation)
        # A peer registers again and again until it hears that it is accepted, and says nothing else before. One that has, and
        # registers now, had lost us, while we did not run perhaps: it has let go of what we share, and so must we.
        if known is not None and known.has_answered:
            self.lose(known, "it had lost us")
            known = None
        namesakes = [p for p in self.peers.values() if p.instance == register.instance and p.role == role]
        for former in namesakes:
            if former.incarnation != incarnation:
                self.lose(former, "replaced by a new life")
        if known is None and self._admit is not None:
            try:
                self._admit(register)
            except HeadraceError as error:
                self._refuse(routing_id, edge, incarnation, error)
                return
        peer = known or Peer(edge, role, register.instance, incarnation, self._send_to)
        self._by_routing_id.pop(peer.routing_id, None)
        peer.routing_id = routing_id
        peer.address = register.address
        peer.models = tuple(register.models)
        peer.capacity = register.capacity if register.HasField("capacity") else None
        peer.last_seen_ns = now_ns
        self._by_routing_id[routing_id] = peer
        self._send_registered(routing_id, edge, incarnation, answer)
        if known is None:
            self.peers[incarnation] = peer
            self.metrics.peers.labels(edge.name, role).inc()
            log.info("peer.registered", peer=peer.instance, role=role, incarnation=f"{incarnation:016x}")
            self.handler.on_peer(peer)

    def _send_to(self, peer: Peer, arm: str, body: Message, frames: Parts) -> None:
        data = self.seal(peer.edge, peer.role, arm, body, peer.incarnation)
        try:
            self._send(peer.routing_id, [data, *frames])
        except OverloadedError:
            self.metrics.overloads.labels(peer.edge.name).inc()
            raise

    def _refuse(self, routing_id: bytes, edge: Edge, recipient: int, error: HeadraceError) -> None:
        """Say why one that registers is not taken. It asks again."""
        self.drop(self.backplane.name, "refused_register", error.message)
        detail = ErrorDetail(code=error.code, message=error.message)
        self._send_registered(routing_id, edge, recipient, Registered(instance=self.identity.instance, error=detail))

    def _send_registered(self, routing_id: bytes, edge: Edge, recipient: int, answer: Registered) -> None:
        self._send_quietly(routing_id, edge, edge.back, "registered", answer, recipient)

    def _answer_stranger(self, routing_id: bytes, message: Any, reason: str, *, register_again: bool) -> None:
        # The arms of control messages have the same numbers in every inbox, so any back role can read this.
        edge = self.backplane.edges[0]
        body = Unsupported(reason=reason, register_again=register_again)
        self._send_quietly(routing_id, edge, edge.back, "unsupported", body, message.header.sender_incarnation)

    def _send_quietly(self, routing_id: bytes, edge: Edge, role: str, arm: str, body: Message, recipient: int) -> None:
        try:
            self._send(routing_id, [self.seal(edge, role, arm, body, recipient)])
        except (OverloadedError, ReplicaDeadError):
            # It asks again when it hears nothing.
            self.metrics.overloads.labels(edge.name).inc()


class BackSession(Session):
    """The dialling end of one connection.

    Attributes:
        is_active: Whether it may register; an inactive one only inquires.
        refused_reason: Why the front does not take us; empty while it does not say so.
    """

    def __init__(  # noqa: PLR0913 - all by name, from one place
        self,
        identity: Identity,
        edge: Edge,
        address: str,
        handler: Handler,
        *,
        register: Callable[[], Register],
        send: Callable[[Parts], None],
        metrics: WireMetrics,
        leases: Leases,
        unix_ns: Callable[[], int],
        is_active: bool = True,
    ) -> None:
        super().__init__(identity, handler, metrics, leases, unix_ns)
        self.edge = edge
        self.address = address
        self.peer: Peer | None = None
        self.is_active = is_active
        self.inquired_lanes: int | None = None
        self.inquired_instance = ""
        self.refused_reason = ""
        self._register = register
        self._send = send
        self._next_register_ns = 0
        self._next_heartbeat_ns = 0

    def receive(self, parts: Parts, now_ns: int) -> None:
        """Take one message."""
        message = self.parse(self.edge.name, parts)
        if message is None:
            return
        sender = message.header.sender_incarnation
        if message.header.recipient_incarnation not in (0, self.identity.incarnation):
            self.drop(self.edge.name, "former_life")
            return
        if self.peer is not None and sender != self.peer.incarnation:
            self.lose("the process behind the address was restarted")
        arm = message.WhichOneof("body")
        refusal = self.refusal(message, self.edge.to_back)
        if refusal is not None:
            self.drop(self.edge.name, "unsupported", refusal)
            if self.peer is not None:
                self.reply_unsupported(self.peer, refusal)
        elif arm == "registered":
            self._on_registered(sender, message.registered, now_ns)
        elif arm == "unsupported":
            self._on_unsupported(message.unsupported)
        elif self.peer is None:
            self.drop(self.edge.name, "unregistered")
        else:
            self.peer.last_seen_ns = now_ns
            self._dispatch(self.peer, message, arm, parts)

    def tick(self, now_ns: int) -> None:
        """Register or inquire until answered, heartbeat afterwards, and notice when the front falls silent."""
        self.excuse(() if self.peer is None else (self.peer,), now_ns)
        if self.peer is None:
            if now_ns >= self._next_register_ns:
                body = self._register()
                body.inquiry = not self.is_active
                # What could not be sent, because nobody is connected yet, is tried again at the next tick.
                if self._send_quietly("register", body, 0):
                    self._next_register_ns = now_ns + self.leases.register_ns * (10 if self.refused_reason else 1)
                else:
                    self.refused_reason = ""
            return
        if now_ns - self.peer.last_seen_ns > self.leases.lease_ns:
            self.lose(f"not heard of for {self.leases.lease_ns / 1e9:g} s")
        elif now_ns >= self._next_heartbeat_ns:
            self.beat(now_ns)

    def due_ns(self) -> int | None:
        """When `tick` has something to do next, unless something is heard before; None while no front has accepted us: soon."""
        if self.peer is None:
            return None
        return min(self._next_heartbeat_ns, self.peer.last_seen_ns + self.leases.lease_ns + 1)

    def register_now(self, now_ns: int) -> None:
        """Register at once, without waiting for the interval since the inquiry."""
        self._next_register_ns = now_ns
        self.tick(now_ns)

    def beat(self, now_ns: int) -> None:
        """Send a heartbeat now: at its time, or because something changed that the front should know."""
        if self.peer is not None:
            self._next_heartbeat_ns = self.next_beat_ns(now_ns)
            self._send_quietly("heartbeat", self.heartbeat(), self.peer.incarnation)

    def drain(self) -> None:
        """Announce that no new work is taken."""
        self.is_draining = True
        if self.peer is not None:
            self._send_quietly("drain", Drain(), self.peer.incarnation)

    def goodbye(self, reason: str) -> None:
        """Leave."""
        if self.peer is not None:
            self._send_quietly("goodbye", Goodbye(reason=reason), self.peer.incarnation)

    def lose(self, reason: str) -> None:
        """Forget the front, tell the service, and register anew."""
        peer, self.peer = self.peer, None
        self.inquired_lanes = None
        self._next_register_ns = 0
        if peer is not None:
            peer.is_alive = False
            self.metrics.peers.labels(self.edge.name, peer.role).dec()
            log.info("peer.lost", peer=peer.instance, role=peer.role, reason=reason)
            self.handler.on_peer_lost(peer, reason)

    def _on_registered(self, sender: int, registered: Registered, now_ns: int) -> None:
        if registered.HasField("error"):
            if self.refused_reason != registered.error.message:
                self.refused_reason = registered.error.message
                log.error("registration.refused", address=self.address, reason=registered.error.message)
            return
        self.refused_reason = ""
        if registered.inquiry:
            self.inquired_lanes = registered.num_lanes
            self.inquired_instance = registered.instance
            return
        if self.peer is not None:
            self.peer.last_seen_ns = now_ns
            return
        peer = Peer(self.edge, self.edge.front, registered.instance, sender, self._send_to)
        peer.address = self.address
        peer.num_lanes = registered.num_lanes
        peer.last_seen_ns = now_ns
        self.peer = peer
        self.metrics.peers.labels(self.edge.name, peer.role).inc()
        log.info("peer.accepted", peer=peer.instance, role=peer.role, address=self.address)
        self.beat(now_ns)
        self.handler.on_peer(peer)

    def _on_unsupported(self, unsupported: Unsupported) -> None:
        if unsupported.register_again:
            self.lose(f"the other end does not know us: {unsupported.reason}")
        else:
            log.warning("peer.refused_message", address=self.address, reason=unsupported.reason)

    def _dispatch(self, peer: Peer, message: Any, arm: str, parts: Parts) -> None:
        if arm not in CONTROL_ARMS:
            self.deliver(peer, message, arm, parts)
        elif arm == "heartbeat":
            _take_heartbeat(peer, message.heartbeat)
            self.handler.on_heartbeat(peer)
        elif arm == "drain":
            peer.is_draining = True
            self.handler.on_heartbeat(peer)
        elif arm == "goodbye":
            self.lose(f"left: {message.goodbye.reason}")

    def _send_to(self, peer: Peer, arm: str, body: Message, frames: Parts) -> None:
        data = self.seal(self.edge, self.edge.front, arm, body, peer.incarnation)
        try:
            self._send([data, *frames])
        except OverloadedError:
            self.metrics.overloads.labels(self.edge.name).inc()
            raise

    def _send_quietly(self, arm: str, body: Message, recipient: int) -> bool:
        try:
            self._send([self.seal(self.edge, self.edge.front, arm, body, recipient)])
        except (OverloadedError, ReplicaDeadError):
            # Not connected yet, or not read: it is said again at a later tick.
            self.metrics.overloads.labels(self.edge.name).inc()
            return False
        return True


def _take_heartbeat(peer: Peer, heartbeat: Heartbeat) -> None:
    peer.load = heartbeat.load
    peer.progress = heartbeat.progress
    peer.is_draining = heartbeat.draining
    peer.models = tuple(heartbeat.models)
