"""Real sockets: registration, restarts, CURVE, peers that do not read."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
from prometheus_client import CollectorRegistry

from headrace.errors import ConfigError, OverloadedError
from headrace.v1.control_pb2 import Register
from headrace.v1.tokenizer_pb2 import Tokenize, TokenizeReply
from headrace.wire import link, topology
from headrace.wire.envelope import int32_array, int32_frame, seal
from headrace.wire.keys import create_keys, load_keys
from headrace.wire.link import Wire
from tests.patience import WAIT_S
from tests.unit.wire.test_session import Recorder, register


async def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is told by sockets
            await asyncio.sleep(0.01)


class Wires:
    """Makes wires and closes them."""

    def __init__(self) -> None:
        self.made: list[Wire] = []

    def __call__(self, role: str, instance: str, keys_directory: Path | None = None) -> Wire:
        keys = load_keys(keys_directory, role) if keys_directory else None
        wire = Wire(role=role, instance=instance, registry=CollectorRegistry(), keys=keys)
        self.made.append(wire)
        return wire


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    made = Wires()
    yield made
    for wire in made.made:
        await wire.close()


def _register(instance: str) -> Callable[[], Register]:
    return lambda: register("tokenizer", instance)


async def test_messages_and_frames_cross_ipc_both_ways(wires: Wires, tmp_path: Path) -> None:
    router, tokenizer = Recorder(), Recorder()
    front = wires("router", "router-0").bind(topology.ROUTER_BACKPLANE, f"ipc://{tmp_path}/r", router)
    wires("tokenizer", "tokenizer-0").dial(topology.ROUTER_BACKPLANE, [front.address], tokenizer, register=_register("tokenizer-0"))
    await until(lambda: router.peers and tokenizer.peers)
    for index in range(300):
        router.peers[0].send("tokenize", Tokenize(text=str(index)), [int32_frame(range(index))])
        tokenizer.peers[0].send("tokenize_reply", TokenizeReply(request_id=str(index)))
    await until(lambda: len(router.messages) == 300 and len(tokenizer.messages) == 300)
    assert [m.tokenize.text for _, m, _ in tokenizer.messages] == [str(i) for i in range(300)]
    assert len(int32_array(tokenizer.messages[299][2][0])) == 299


async def test_back_registers_with_a_front_that_comes_later_and_again_after_its_restart(wires: Wires, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/r"
    tokenizer, first, second = Recorder(), Recorder(), Recorder()
    wires("tokenizer", "tokenizer-0").dial(topology.ROUTER_BACKPLANE, [address], tokenizer, register=_register("tokenizer-0"))
    await asyncio.sleep(0.1)
    wire = wires("router", "router-0")
    wire.bind(topology.ROUTER_BACKPLANE, address, first)
    await until(lambda: tokenizer.peers)
    await wire.close()
    await until(lambda: tokenizer.lost)
    wires("router", "router-0").bind(topology.ROUTER_BACKPLANE, address, second)
    await until(lambda: len(tokenizer.peers) == 2)
    assert second.peers


async def test_curve_admits_known_keys_only(wires: Wires, tmp_path: Path) -> None:
    keys, strange_keys = tmp_path / "keys", tmp_path / "strange"
    assert create_keys(keys)
    assert create_keys(strange_keys)
    assert not create_keys(keys)
    router, friend, stranger, naked = Recorder(), Recorder(), Recorder(), Recorder()
    front = wires("router", "router-0", keys).bind(topology.ROUTER_BACKPLANE, "tcp://127.0.0.1:0", router)
    for name, handler, directory in (("stranger", stranger, strange_keys), ("naked", naked, None), ("friend", friend, keys)):
        wires("tokenizer", name, directory).dial(topology.ROUTER_BACKPLANE, [front.address], handler, register=_register(name))
    await until(lambda: router.peers)
    # Whoever dials after them is let in, while they try again and again.
    wires("tokenizer", "late", keys).dial(topology.ROUTER_BACKPLANE, [front.address], Recorder(), register=_register("late"))
    await until(lambda: len(router.peers) >= 2)
    assert [peer.instance for peer in router.peers] == ["friend", "late"]
    assert not stranger.peers
    assert not naked.peers


async def test_wildcard_without_curve_is_refused(wires: Wires) -> None:
    with pytest.raises(ConfigError, match="insecure"):
        wires("router", "router-0").bind(topology.ROUTER_BACKPLANE, "tcp://*:0", Recorder())


async def test_busy_address_is_named(wires: Wires) -> None:
    front = wires("router", "router-0").bind(topology.ROUTER_BACKPLANE, "tcp://127.0.0.1:0", Recorder())
    with pytest.raises(ConfigError, match=re.escape(front.address)):
        wires("router", "router-1").bind(topology.ROUTER_BACKPLANE, front.address, Recorder())


async def test_peer_that_never_reads_overloads_only_itself(wires: Wires, tmp_path: Path) -> None:
    """A raw socket registers and then never reads: sends to it end in OverloadedError, a good peer is served all the while."""
    router, good = Recorder(), Recorder()
    wire = wires("router", "router-0")
    front = wire.bind(topology.ROUTER_BACKPLANE, f"ipc://{tmp_path}/r", router)
    wires("tokenizer", "good").dial(topology.ROUTER_BACKPLANE, [front.address], good, register=_register("good"))
    await until(lambda: good.peers)
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.RCVHWM, 1)
        raw.connect(front.address)
        inbox = topology.INBOXES["router"]
        raw.send(
            seal(inbox, "register", register("tokenizer", "deaf"), sender_incarnation=5, recipient_incarnation=0, sent_unix_ns=1)
        )
        await until(lambda: len(router.peers) == 2)
        deaf = next(peer for peer in router.peers if peer.instance == "deaf")
        body = Tokenize(text="x" * 10_000)
        with pytest.raises(OverloadedError):
            for _ in range(20_000):
                deaf.send("tokenize", body)
        next(peer for peer in router.peers if peer.instance == "good").send("tokenize", body)
        await until(lambda: good.messages)


async def test_worker_joins_the_scheduler_with_the_fewest_lanes(
    wires: Wires, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both are heard, however far apart their answers come.
    monkeypatch.setattr(link, "INQUIRY_SETTLE_S", WAIT_S)
    busy, idle, worker = Recorder(), Recorder(), Recorder()
    addresses = []
    for name, handler, lanes in (("scheduler-0", busy, 2), ("scheduler-1", idle, 1)):
        wire = wires("scheduler", name)
        front = wire.bind(topology.SCHEDULER_BACKPLANE, f"ipc://{tmp_path}/{name}", handler)
        front.session.num_lanes = lanes
        addresses.append(front.address)
    wires("worker", "worker-0").dial(
        topology.SCHEDULER_BACKPLANE, addresses, worker, register=lambda: register("worker", "worker-0"), join="fewest_lanes"
    )
    await until(lambda: worker.peers and idle.peers)
    assert [peer.instance for peer in worker.peers] == ["scheduler-1"]
    assert not busy.peers


async def test_second_process_cannot_take_an_ipc_address_over(wires: Wires, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/r"
    first, second, tokenizer = Recorder(), Recorder(), Recorder()
    wire = wires("router", "router-0")
    wire.bind(topology.ROUTER_BACKPLANE, address, first)
    with pytest.raises(ConfigError, match="in use"):
        wires("router", "router-1").bind(topology.ROUTER_BACKPLANE, address, second)
    wires("tokenizer", "tokenizer-0").dial(topology.ROUTER_BACKPLANE, [address], tokenizer, register=_register("tokenizer-0"))
    await until(lambda: first.peers)
    await wire.close()
    assert os.listdir(tmp_path) == []
    wires("router", "router-2").bind(topology.ROUTER_BACKPLANE, address, second)
    await until(lambda: second.peers)


async def test_looks_are_rare_once_all_are_acquainted_and_soon_when_one_is_lost(
    wires: Wires, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s: dict[str, list[float]] = {"router": [], "tokenizer": []}
    set_ticker = Wire._set_ticker

    def record(self: Wire, pause_s: float) -> None:
        pauses_s[self.identity.role].append(pause_s)
        set_ticker(self, pause_s)

    monkeypatch.setattr(Wire, "_set_ticker", record)
    tokenizer = Recorder()
    router = wires("router", "router-0")
    front = router.bind(topology.ROUTER_BACKPLANE, f"ipc://{tmp_path}/r", Recorder())
    wires("tokenizer", "tokenizer-0").dial(topology.ROUTER_BACKPLANE, [front.address], tokenizer, register=_register("tokenizer-0"))
    await until(lambda: tokenizer.peers)
    for role, found in pauses_s.items():
        found.clear()
        await until(lambda found=found: max(found, default=0.0) > 4 * link.TICK_S)  # type: ignore[misc]
        assert max(found) <= 0.5 + link.TIMER_EARLY_NS / 1e9, f"{role}: heartbeats come as often as before"
    await router.close()
    await until(lambda: tokenizer.lost)
    found = pauses_s["tokenizer"]
    # Where a look was due by then anyway, that one is taken.
    await until(lambda: found[-1] <= link.TICK_S)
    found.clear()
    await until(lambda: len(found) >= 3)
    assert max(found) <= link.TICK_S, "it tries again and again"
