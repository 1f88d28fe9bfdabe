"""Links over ZeroMQ: the shell round `session.py`, and the only place with sockets.

Sockets are read straight from the event loop: ZeroMQ's descriptor is edge-triggered, so after every wake-up and every send the
socket is drained until it has nothing left, in slices that let other callbacks run. That costs no future and no task a message.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Literal

import structlog
import zmq
from prometheus_client import CollectorRegistry

from headrace.errors import ConfigError, OverloadedError, ReplicaDeadError
from headrace.telemetry.metrics import WireMetrics
from headrace.v1.common_pb2 import ModelInfo
from headrace.v1.control_pb2 import Load, Progress, Register
from headrace.wire.ipc_lock import IpcLock
from headrace.wire.keys import Doorkeeper, Keys
from headrace.wire.resolve import check_address, is_wildcard, resolve, split_tcp
from headrace.wire.session import BackSession, FrontSession, Handler, Identity, Leases, Parts, Peer
from headrace.wire.topology import Backplane, Edge

__all__ = ["Back", "Front", "Handler", "Peer", "Wire", "new_incarnation"]

log = structlog.get_logger()

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
RECEIVE_SLICE = 64
"""Messages handled in one turn of the event loop, so that one busy socket does not starve the others."""
TICK_S = 0.05
"""Between two looks while some front has not accepted us yet. Once all have, a look comes when a heartbeat or the end of a lease
is due: each costs an idle process some 200 microseconds."""
TICK_MIN_S = 0.005
TIMER_EARLY_NS = 1_500_000
"""The event loop's timers count whole milliseconds, of a clock that is cut to milliseconds: they may come so much too early."""
RESOLVE_INTERVAL_S = 3.0
INQUIRY_SETTLE_S = 0.3
GOODBYE_LINGER_MS = 200
_NEVER_NS = 60_000_000_000


def new_incarnation() -> int:
    """A random number for a process life, never zero."""
    return secrets.randbits(63) | 1


class _Socket:
    """One ZeroMQ socket on the event loop."""

    def __init__(self, socket: zmq.Socket[bytes], on_parts: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_parts = on_parts
        self._loop = asyncio.get_running_loop()
        self._drain_handle: asyncio.Handle | None = None
        self._loop.add_reader(socket.fileno(), self._drain)

    def send(self, parts: Parts) -> None:
        """Queue a message or raise `zmq.Again`; never blocks."""
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        finally:
            # A send may swallow the edge that announced input.
            if self._drain_handle is None:
                self._drain_handle = self._loop.call_soon(self._drain)

    def close(self, linger_ms: int) -> None:
        """Leave the loop and close; what is queued may still go out for `linger_ms`."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
            if self._drain_handle is not None:
                self._drain_handle.cancel()
            self._socket.close(linger_ms)

    def _is_open(self) -> bool:
        return not self._socket.closed

    def _drain(self) -> None:
        self._drain_handle = None
        if not self._is_open():
            return
        for _ in range(RECEIVE_SLICE):
            # Asking first is cheaper than the exception of a receive in vain.
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self._on_parts(self._socket.recv_multipart(zmq.NOBLOCK))
            if not self._is_open():
                return
        self._drain_handle = self._loop.call_soon(self._drain)


class Front:
    """A bound address and the peers registered at it."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        address: str,
        lock: IpcLock | None,
        make_session: Callable[[Callable[[bytes, Parts], None]], FrontSession],
    ) -> None:
        self.address = address
        self.session = make_session(self._send)
        self._lock = lock
        self._socket = _Socket(socket, self._on_parts)

    @property
    def peers(self) -> dict[int, Peer]:
        """Registered peers by incarnation."""
        return self.session.peers

    def tick(self, now_ns: int) -> None:
        """Leases and heartbeats."""
        self.session.tick(now_ns)

    def due_ns(self) -> int:
        """When the next tick is wanted."""
        return self.session.due_ns()

    def close(self, reason: str) -> None:
        """Say goodbye, unbind, and remove the socket's file."""
        self.session.goodbye(reason)
        self._socket.close(GOODBYE_LINGER_MS)
        if self._lock is not None:
            self._lock.release()

    def _on_parts(self, parts: list[bytes]) -> None:
        if len(parts) < 2:
            self.session.drop(self.session.backplane.name, "undecodable", "no payload frame")
            return
        self.session.receive(parts[0], parts[1:], time.monotonic_ns())

    def _send(self, routing_id: bytes, parts: Parts) -> None:
        try:
            self._socket.send([routing_id, *parts])
        except zmq.Again as error:
            raise OverloadedError(
                f"the queue of the {self.session.backplane.name} link to a peer is full: it does not read"
            ) from error
        except zmq.ZMQError as error:
            raise ReplicaDeadError(f"the peer's connection is gone ({error.strerror})") from error


class _Connection:
    """One dialled address."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        make_session: Callable[[Callable[[Parts], None]], BackSession],
        on_unsettled: Callable[[], None],
    ) -> None:
        self.session = make_session(self._send)
        self.socket = _Socket(socket, self._on_parts)
        self._on_unsettled = on_unsettled
        on_unsettled()

    def _on_parts(self, parts: list[bytes]) -> None:
        self.session.receive(parts, time.monotonic_ns())
        if self.session.peer is None:
            self._on_unsettled()

    def _send(self, parts: Parts) -> None:
        try:
            self.socket.send(parts)
        except zmq.Again as error:
            raise OverloadedError(f"the queue of the {self.session.edge.name} link to {self.session.address} is full") from error
        except zmq.ZMQError as error:
            raise ReplicaDeadError(f"the connection to {self.session.address} is gone ({error.strerror})") from error


class Back:
    """All dialled connections of one edge: one for each address that the targets resolve to."""

    def __init__(
        self,
        wire: Wire,
        edge: Edge,
        default_port: int,
        targets: Sequence[str],
        *,
        connect: Callable[[str], _Connection],
        join: Literal["all", "fewest_lanes"],
    ) -> None:
        self.edge = edge
        self._wire = wire
        self._targets = [check_address(target) for target in targets]
        self._default_port = default_port
        self._connect = connect
        self._join = join
        self._connections: dict[str, _Connection] = {}
        self._static: set[str] = set()
        self._resolver: asyncio.Task[None] | None = None
        self._inquiry_since_ns: int | None = None
        if self._targets:
            self._resolver = asyncio.get_running_loop().create_task(self._resolve_for_ever())

    @property
    def peers(self) -> dict[int, Peer]:
        """Fronts that accepted us, by incarnation."""
        found = (connection.session.peer for connection in self._connections.values())
        return {peer.incarnation: peer for peer in found if peer is not None}

    def peer_at(self, address: str) -> Peer | None:
        """The accepted front behind an address, if any."""
        connection = self._connections.get(address)
        return connection.session.peer if connection else None

    @property
    def refused_reason(self) -> str:
        """Why a front does not take us; empty while none says so."""
        return next(
            (connection.session.refused_reason for connection in self._connections.values() if connection.session.refused_reason),
            "",
        )

    def add_target(self, address: str) -> None:
        """Dial one more address (not a name to look up). Known ones are kept."""
        if address not in self._connections:
            self._static.add(address)
            self._connections[address] = self._connect(check_address(address))
            self._connections[address].session.tick(time.monotonic_ns())

    def remove_target(self, address: str) -> None:
        """Leave an address. The service is not told: it asked."""
        self._static.discard(address)
        connection = self._connections.pop(address, None)
        if connection is not None:
            connection.session.goodbye("not needed any more")
            connection.socket.close(GOODBYE_LINGER_MS)

    def announce_drain(self) -> None:
        """Tell all fronts that no new work is taken."""
        for connection in self._connections.values():
            connection.session.drain()

    def beat_now(self) -> None:
        """Send a heartbeat to all fronts at once: something changed that they should know now."""
        now_ns = time.monotonic_ns()
        for connection in self._connections.values():
            connection.session.beat(now_ns)

    def tick(self, now_ns: int) -> None:
        """Registering, leases, heartbeats; and the choice of a scheduler where one is to be joined."""
        for connection in list(self._connections.values()):
            connection.session.tick(now_ns)
        if self._join == "fewest_lanes":
            self._choose(now_ns)

    def due_ns(self) -> int | None:
        """When the next tick is wanted; None: soon, as some front has not accepted us yet."""
        dues_ns = [connection.session.due_ns() for connection in self._connections.values()]
        if None in dues_ns:
            return None
        return min((due_ns for due_ns in dues_ns if due_ns is not None), default=time.monotonic_ns() + _NEVER_NS)

    def close(self, reason: str) -> None:
        """Say goodbye everywhere and hang up."""
        if self._resolver is not None:
            self._resolver.cancel()
        for connection in self._connections.values():
            connection.session.goodbye(reason)
            connection.socket.close(GOODBYE_LINGER_MS)
        self._connections.clear()

    def _choose(self, now_ns: int) -> None:
        sessions = [connection.session for connection in self._connections.values()]
        if any(session.is_active and (session.peer or session.inquired_lanes is not None) for session in sessions):
            return
        for session in sessions:
            session.is_active = False
        answered = [session for session in sessions if session.inquired_lanes is not None]
        if not answered:
            self._inquiry_since_ns = None
            return
        self._inquiry_since_ns = self._inquiry_since_ns or now_ns
        if len(answered) == len(sessions) or now_ns - self._inquiry_since_ns > INQUIRY_SETTLE_S * 1e9:
            best = min(answered, key=lambda session: (session.inquired_lanes or 0, session.inquired_instance))
            best.is_active = True
            best.register_now(now_ns)
            self._inquiry_since_ns = None
            log.info("scheduler.chosen", instance=best.inquired_instance, address=best.address, num_lanes=best.inquired_lanes)

    async def _resolve_for_ever(self) -> None:
        while True:
            answers = [await resolve(target, default_port=self._default_port) for target in self._targets]
            wanted = {address for answer in answers if answer for address in answer}
            for address in wanted - self._connections.keys():
                self._connections[address] = self._connect(address)
            if None not in answers:
                # An address that left the name is dropped once the process behind it is gone, not before.
                for address in self._connections.keys() - wanted - self._static:
                    if self._connections[address].session.peer is None:
                        self._connections.pop(address).socket.close(0)
            await asyncio.sleep(RESOLVE_INTERVAL_S if wanted else TICK_S * 2)


class Wire:
    """All links of one process: one ZeroMQ context, one incarnation, one ticking clock."""

    def __init__(
        self,
        *,
        role: str,
        instance: str,
        registry: CollectorRegistry,
        keys: Keys | None = None,
        is_insecure_allowed: bool = False,
        leases: Leases | None = None,
    ) -> None:
        self.identity = Identity(role, instance, new_incarnation())
        self._keys = keys
        self._is_insecure_allowed = is_insecure_allowed
        self._leases = leases or Leases()
        self._metrics = WireMetrics(registry)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._links: list[Front | Back] = []
        self._num_connections = 0
        self._doorkeeper: Doorkeeper | None = None
        self._zap: _Socket | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._before_beat: Callable[[], None] | None = None

    @property
    def incarnation(self) -> int:
        """This process life's number."""
        return self.identity.incarnation

    def bind(
        self, backplane: Backplane, address: str, handler: Handler, *, admit: Callable[[Register], None] | None = None
    ) -> Front:
        """Open a backplane.

        Args:
            backplane: Which.
            address: Where.
            handler: Who is told of peers and messages.
            admit: Raises a `HeadraceError` where one that registers is not to be taken; it is told, and asks again every second.

        Raises:
            ConfigError: The address is busy, malformed, or open to every interface without CURVE.
        """
        check_address(address)
        if is_wildcard(address) and self._keys is None and not self._is_insecure_allowed:
            raise ConfigError(
                f"{address} would be open on every interface without CURVE: set wire.keys_directory (`headrace keys create`), "
                "or wire.insecure: true if the network itself is trusted"
            )
        lock = IpcLock(address) if address.startswith("ipc://") else None
        socket = self._make_socket(zmq.ROUTER, max(edge.queue_messages for edge in backplane.edges))
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self._keys is not None and address.startswith("tcp://"):
            self._guard(backplane, socket)
        try:
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.bind(_with_port(address, backplane.default_port))
        except zmq.ZMQError as error:
            socket.close(0)
            if lock is not None:
                lock.release()
            raise ConfigError(f"{address} cannot be bound ({error.strerror}): stop what uses it, or set another address") from error
        bound = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)

        def make_session(send: Callable[[bytes, Parts], None]) -> FrontSession:
            return FrontSession(
                self.identity,
                backplane,
                handler,
                send=send,
                metrics=self._metrics,
                leases=self._leases,
                unix_ns=time.time_ns,
                admit=admit,
            )

        front = Front(socket, bound.decode().rstrip("\0"), lock, make_session)
        self._add(front)
        return front

    def dial(
        self,
        backplane: Backplane,
        targets: Sequence[str],
        handler: Handler,
        *,
        register: Callable[[], Register],
        join: Literal["all", "fewest_lanes"] = "all",
    ) -> Back:
        """Dial a backplane at all addresses its targets stand for; names are looked up again every few seconds."""
        edge = backplane.edge_from(self.identity.role)
        if edge is None:
            raise ConfigError(f"a {self.identity.role} does not dial the {backplane.name} backplane")
        is_active = join == "all"

        def connect(address: str) -> _Connection:
            socket = self._make_socket(zmq.DEALER, edge.queue_messages)
            # Queue nothing for an address where nobody answers yet.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            self._num_connections += 1
            # A routing id of its own for each connection: a front may still hold the former one when an address is dialled again.
            socket.setsockopt(zmq.ROUTING_ID, b"H" + self.incarnation.to_bytes(8, "big") + self._num_connections.to_bytes(4, "big"))
            if self._keys is not None and address.startswith("tcp://"):
                socket.curve_secretkey = self._keys.secret
                socket.curve_publickey = self._keys.public[self._keys.role]
                socket.curve_serverkey = self._keys.public[backplane.front]
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.connect(address)

            def make_session(send: Callable[[Parts], None]) -> BackSession:
                return BackSession(
                    self.identity,
                    edge,
                    address,
                    handler,
                    register=register,
                    send=send,
                    metrics=self._metrics,
                    leases=self._leases,
                    unix_ns=time.time_ns,
                    is_active=is_active,
                )

            return _Connection(socket, make_session, self._tick_soon)

        back = Back(self, edge, backplane.default_port, targets, connect=connect, join=join)
        self._add(back)
        return back

    def set_load(self, load: Load, progress: Progress, models: Sequence[ModelInfo] = (), *, num_lanes: int = 0) -> None:
        """What the next heartbeats say."""
        for link in self._links:
            sessions = [link.session] if isinstance(link, Front) else [c.session for c in link._connections.values()]
            for session in sessions:
                session.load, session.progress, session.models = load, progress, tuple(models)
                if isinstance(session, FrontSession):
                    session.num_lanes = num_lanes

    def before_beat(self, callback: Callable[[], None]) -> None:
        """Called at each tick before heartbeats are sent: the place to `set_load`."""
        self._before_beat = callback

    async def close(self, reason: str = "stopped") -> None:
        """Say goodbye on every link and close everything; what is queued gets a moment to go out."""
        if self._ticker is not None:
            self._ticker.cancel()
        for link in self._links:
            link.close(reason)
        self._links.clear()
        if self._zap is not None:
            self._zap.close(0)
        # Lingering sockets hold the context's end back by at most GOODBYE_LINGER_MS; off the loop, so that it goes on.
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    def _add(self, link: Front | Back) -> None:
        self._links.append(link)
        if self._ticker is None:
            self._tick()
        self._tick_soon()

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        if self._before_beat is not None:
            self._before_beat()
        for link in list(self._links):
            link.tick(now_ns)
        self._set_ticker(self._pause_s(now_ns))

    def _pause_s(self, now_ns: int) -> float:
        dues_ns = [link.due_ns() for link in self._links]
        earliest_ns = min((due_ns for due_ns in dues_ns if due_ns is not None), default=now_ns + _NEVER_NS)
        # A timer that came early would find nothing due, and a look costs as much as one that does.
        pause_s = max(TICK_MIN_S, (earliest_ns - now_ns + TIMER_EARLY_NS) / 1e9)
        return min(TICK_S, pause_s) if None in dues_ns else pause_s

    def _tick_soon(self) -> None:
        """A connection is to be made, or made anew: the next look may not wait for the next heartbeat."""
        if self._ticker is not None and self._ticker.when() > asyncio.get_running_loop().time() + TICK_S:
            self._set_ticker(TICK_S)

    def _set_ticker(self, pause_s: float) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        self._ticker = asyncio.get_running_loop().call_later(pause_s, self._tick)

    def _make_socket(self, kind: int, queue_messages: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, queue_messages)
        socket.setsockopt(zmq.RCVHWM, queue_messages)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        # ZeroMQ's own pings close a connection whose machine vanished.
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        return socket

    def _guard(self, backplane: Backplane, socket: zmq.Socket[bytes]) -> None:
        assert self._keys is not None
        if self._doorkeeper is None:
            self._doorkeeper = doorkeeper = Doorkeeper()
            zap = self._context.socket(zmq.ROUTER)
            zap.bind(Doorkeeper.ENDPOINT)

            def answer(parts: list[bytes]) -> None:
                border = parts.index(b"") + 1
                assert self._zap is not None
                self._zap.send([*parts[:border], *doorkeeper.answer(parts[border:])])

            self._zap = _Socket(zap, answer)
        self._doorkeeper.admit(backplane.name, [self._keys.public[edge.back] for edge in backplane.edges])
        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret
        socket.curve_publickey = self._keys.public[self._keys.role]
        socket.setsockopt_string(zmq.ZAP_DOMAIN, backplane.name)


def _with_port(address: str, default_port: int) -> str:
    if not address.startswith("tcp://"):
        return address
    host, port = split_tcp(address, default_port=default_port)
    return f"tcp://{host if ':' not in host else f'[{host}]'}:{port or '*'}"
