"""Links in memory, for tests: the real sessions and real bytes over a network that can lose, cut and fill up.

network = FakeNetwork()
router = network.wire("router", "router-0")
tokenizer = network.wire("tokenizer", "tokenizer-0")
front = router.bind(topology.ROUTER_BACKPLANE, "fake://router", handler)
back = tokenizer.dial(topology.ROUTER_BACKPLANE, ["fake://router"], handler, register=...)
network.settle()        # deliver until nothing moves; network.advance(seconds) lets time pass
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry

from headrace.errors import OverloadedError, ReplicaDeadError
from headrace.telemetry.metrics import WireMetrics
from headrace.v1.common_pb2 import ModelInfo
from headrace.v1.control_pb2 import Load, Progress, Register
from headrace.wire.link import new_incarnation
from headrace.wire.session import BackSession, FrontSession, Handler, Identity, Leases, Parts, Peer
from headrace.wire.topology import Backplane

FIRST_UNIX_NS = 1_800_000_000_000_000_000
SETTLE_ROUNDS_MAX = 100_000


class FakeNetwork:
    """All wires of a test and its clock. Messages are delivered in order, one at a time, by `settle`."""

    def __init__(self) -> None:
        self.now_ns = 1
        self.fronts: dict[str, FakeFront] = {}
        self.wires: list[FakeWire] = []
        self.full_towards: set[str] = set()
        """Instance names whose queues refuse further messages."""
        self._queue: deque[Callable[[], None]] = deque()

    def wire(self, role: str, instance: str, leases: Leases | None = None) -> FakeWire:
        """A new process life."""
        wire = FakeWire(self, role, instance, leases or Leases())
        self.wires.append(wire)
        return wire

    def unix_ns(self) -> int:
        """The test's wall clock."""
        return FIRST_UNIX_NS + self.now_ns

    def post(self, deliver: Callable[[], None]) -> None:
        """Put a message on its way."""
        self._queue.append(deliver)

    def settle(self) -> None:
        """Tick every wire, then deliver until nothing is on its way."""
        for wire in list(self.wires):
            wire.tick()
        for _ in range(SETTLE_ROUNDS_MAX):
            if not self._queue:
                return
            self._queue.popleft()()
        raise AssertionError("messages go round for ever")

    def advance(self, seconds: float) -> None:
        """Let time pass in steps short enough for heartbeats."""
        end_ns = self.now_ns + int(seconds * 1e9)
        while self.now_ns < end_ns:
            self.now_ns = min(end_ns, self.now_ns + 100_000_000)
            self.settle()


class FakeFront:
    """A bound address in memory."""

    def __init__(
        self,
        wire: FakeWire,
        backplane: Backplane,
        address: str,
        handler: Handler,
        admit: Callable[[Register], None] | None,
    ) -> None:
        self.wire = wire
        self.address = address
        self.connections: dict[bytes, FakeConnection] = {}
        self.session = FrontSession(
            wire.identity,
            backplane,
            handler,
            send=self._send,
            metrics=wire.metrics,
            leases=wire.leases,
            unix_ns=wire.network.unix_ns,
            admit=admit,
        )

    @property
    def peers(self) -> dict[int, Peer]:
        """Registered peers by incarnation."""
        return self.session.peers

    def close(self, reason: str) -> None:
        """Say goodbye and unbind."""
        self.session.goodbye(reason)
        self.wire.network.fronts.pop(self.address, None)

    def _send(self, routing_id: bytes, parts: Parts) -> None:
        connection = self.connections.get(routing_id)
        if connection is None or connection.wire.is_dead:
            raise ReplicaDeadError("the peer's connection is gone")
        if connection.wire.identity.instance in self.wire.network.full_towards:
            raise OverloadedError("the queue is full")
        copies = [bytes(part) for part in parts]
        self.wire.network.post(lambda: connection.receive(copies))


class FakeConnection:
    """One dialled address in memory. It finds whoever is bound there at the moment of each send, as a reconnecting socket does."""

    def __init__(
        self,
        wire: FakeWire,
        backplane: Backplane,
        address: str,
        handler: Handler,
        register: Callable[[], Register],
        *,
        is_active: bool,
    ) -> None:
        self.wire = wire
        self.address = address
        self.routing_id = f"{wire.incarnation:016x}/{address}".encode()
        edge = backplane.edge_from(wire.identity.role)
        assert edge is not None
        self.session = BackSession(
            wire.identity,
            edge,
            address,
            handler,
            register=register,
            send=self._send,
            metrics=wire.metrics,
            leases=wire.leases,
            unix_ns=wire.network.unix_ns,
            is_active=is_active,
        )

    def receive(self, parts: Sequence[bytes]) -> None:
        """Deliver."""
        self.wire.take(lambda: self.session.receive(parts, self.wire.network.now_ns))

    def _send(self, parts: Parts) -> None:
        front = self.wire.network.fronts.get(self.address)
        if front is None or front.wire.is_dead:
            raise OverloadedError(f"nobody answers at {self.address}")
        if front.wire.identity.instance in self.wire.network.full_towards:
            raise OverloadedError("the queue is full")
        front.connections[self.routing_id] = self
        copies = [bytes(part) for part in parts]

        def receive() -> None:
            front.session.receive(self.routing_id, copies, self.wire.network.now_ns)

        self.wire.network.post(lambda: front.wire.take(receive))


class FakeBack:
    """All dialled addresses of one edge, in memory."""

    def __init__(self, connect: Callable[[str], FakeConnection], targets: Sequence[str]) -> None:
        self._connect = connect
        self.connections = {target: connect(target) for target in targets}

    @property
    def peers(self) -> dict[int, Peer]:
        """Fronts that accepted us, by incarnation."""
        found = (connection.session.peer for connection in self.connections.values())
        return {peer.incarnation: peer for peer in found if peer is not None}

    def peer_at(self, address: str) -> Peer | None:
        """The accepted front behind an address, if any."""
        connection = self.connections.get(address)
        return connection.session.peer if connection else None

    @property
    def refused_reason(self) -> str:
        """Why a front does not take us; empty while none says so."""
        return next(
            (connection.session.refused_reason for connection in self.connections.values() if connection.session.refused_reason), ""
        )

    def add_target(self, address: str) -> None:
        """Dial one more address."""
        if address not in self.connections:
            self.connections[address] = self._connect(address)
            self.connections[address].session.tick(self.connections[address].wire.network.now_ns)

    def remove_target(self, address: str) -> None:
        """Leave an address."""
        connection = self.connections.pop(address, None)
        if connection is not None:
            connection.session.goodbye("not needed any more")

    def announce_drain(self) -> None:
        """Tell all fronts that no new work is taken."""
        for connection in self.connections.values():
            connection.session.drain()

    def beat_now(self) -> None:
        """Send a heartbeat to all fronts at once."""
        for connection in self.connections.values():
            connection.session.beat(connection.wire.network.now_ns)

    def close(self, reason: str) -> None:
        """Say goodbye everywhere."""
        for connection in self.connections.values():
            connection.session.goodbye(reason)
        self.connections.clear()


class FakeWire:
    """The interface of `link.Wire` over a `FakeNetwork`."""

    def __init__(self, network: FakeNetwork, role: str, instance: str, leases: Leases) -> None:
        self.network = network
        self.identity = Identity(role, instance, new_incarnation())
        self.leases = leases
        self.metrics = WireMetrics(CollectorRegistry())
        self.is_dead = False
        self._unread: list[Callable[[], None]] | None = None
        self._fronts: list[FakeFront] = []
        self._backs: list[FakeBack] = []
        self._before_beat: Callable[[], None] | None = None

    @property
    def incarnation(self) -> int:
        """This process life's number."""
        return self.identity.incarnation

    def bind(
        self, backplane: Backplane, address: str, handler: Handler, *, admit: Callable[[Register], None] | None = None
    ) -> FakeFront:
        """Open a backplane at an address of the fake network."""
        front = FakeFront(self, backplane, address, handler, admit)
        self.network.fronts[address] = front
        self._fronts.append(front)
        return front

    def dial(
        self,
        backplane: Backplane,
        targets: Sequence[str],
        handler: Handler,
        *,
        register: Callable[[], Register],
        join: Literal["all", "fewest_lanes"] = "all",
    ) -> FakeBack:
        """Dial addresses. `fewest_lanes` takes the first target; the choice is tested on real links."""
        back = FakeBack(
            lambda address: FakeConnection(self, backplane, address, handler, register, is_active=True),
            targets[:1] if join == "fewest_lanes" else targets,
        )
        self._backs.append(back)
        return back

    def set_load(self, load: Load, progress: Progress, models: Sequence[ModelInfo] = (), *, num_lanes: int = 0) -> None:
        """What the next heartbeats say."""
        for front in self._fronts:
            front.session.load, front.session.progress, front.session.models = load, progress, tuple(models)
            front.session.num_lanes = num_lanes
        for back in self._backs:
            for connection in back.connections.values():
                session = connection.session
                session.load, session.progress, session.models = load, progress, tuple(models)

    def before_beat(self, callback: Callable[[], None]) -> None:
        """Called at each tick before heartbeats are sent."""
        self._before_beat = callback

    def tick(self) -> None:
        """Registering, leases, heartbeats at the network's time."""
        if self.is_dead or self._unread is not None:
            return
        if self._before_beat is not None:
            self._before_beat()
        for front in self._fronts:
            front.session.tick(self.network.now_ns)
        for back in self._backs:
            for connection in list(back.connections.values()):
                connection.session.tick(self.network.now_ns)

    def take(self, receive: Callable[[], None]) -> None:
        """A message has come: it is received, or lies unread during a pause, or finds this life over."""
        if self._unread is not None:
            self._unread.append(receive)
        elif not self.is_dead:
            receive()

    def pause(self) -> None:
        """Do nothing and read nothing until `go_on`, as a stopped process does."""
        self._unread = []

    def go_on(self) -> None:
        """Go on after a pause. A tick comes first, then all that has come meanwhile."""
        unread, self._unread = self._unread or [], None
        for receive in unread:
            self.network.post(receive)

    def kill(self) -> None:
        """End this life at once, without a word."""
        self.is_dead = True

    async def close(self, reason: str = "stopped") -> None:
        """Say goodbye on every link."""
        for front in self._fronts:
            front.close(reason)
        for back in self._backs:
            back.close(reason)
        self.is_dead = True
