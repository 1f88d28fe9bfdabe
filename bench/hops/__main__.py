"""What one hop costs: round trips and one-way messages over a link, beside pyzmq's own asyncio sockets.

    python -m bench.hops [--messages 20000]

Both ends share one process and one event loop, so a figure is the CPU time of both together: sealing, sending, receiving, parsing
and dispatch. The comparison sends the same bytes over `zmq.asyncio` sockets with no envelope, lease or check.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import uvloop
import zmq
import zmq.asyncio
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from headrace.telemetry import logs
from headrace.v1.control_pb2 import Register
from headrace.v1.detokenizer_pb2 import TokenBatch
from headrace.v1.scheduler_pb2 import Stop
from headrace.wire import topology
from headrace.wire.keys import create_keys, load_keys
from headrace.wire.link import Peer, Wire

BATCH_ROWS = 64
WINDOW = 256
"""Messages under way at once in the one-way measurement."""


class Echo:
    """Answers each token batch with a stop; counts."""

    def __init__(self, *, is_front: bool, answers: bool) -> None:
        self.is_front = is_front
        self.answers = answers
        self.peer: Peer | None = None
        self.num_received = 0
        self.arrived = asyncio.Event()

    def on_peer(self, peer: Peer) -> None:
        self.peer = peer
        self.arrived.set()

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        raise click.ClickException(f"{peer.instance} was lost: {reason}")

    def on_heartbeat(self, peer: Peer) -> None:
        return

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        self.num_received += 1
        if self.is_front and self.answers:
            peer.send("stop", Stop(stream_ids=[1]))
        self.arrived.set()


def batch() -> TokenBatch:
    """A decode step of 64 streams."""
    return TokenBatch(
        stream_ids=[2**60 + i for i in range(BATCH_ROWS)], first_positions=range(BATCH_ROWS), token_ids=[30_000] * BATCH_ROWS
    )


async def measure_link(address: str, keys: Path | None, count: int) -> tuple[float, float]:
    """Microseconds of CPU a round trip and a one-way message over our link."""
    front_handler, back_handler = Echo(is_front=True, answers=True), Echo(is_front=False, answers=False)
    wires = [
        Wire(role=role, instance=role, registry=CollectorRegistry(), keys=load_keys(keys, role) if keys else None)
        for role in ("detokenizer", "scheduler")
    ]
    front = wires[0].bind(topology.DETOKENIZER_BACKPLANE, address, front_handler)
    register = Register(role=topology.ROLES["scheduler"], instance="scheduler")
    wires[1].dial(topology.DETOKENIZER_BACKPLANE, [front.address], back_handler, register=lambda: register)
    await back_handler.arrived.wait()
    peer = back_handler.peer
    assert peer is not None
    body = batch()
    start = time.process_time()
    for _ in range(count):
        back_handler.arrived.clear()
        peer.send("token_batch", body)
        await back_handler.arrived.wait()
    round_trip = time.process_time() - start
    front_handler.answers = False
    front_handler.num_received = 0
    start = time.process_time()
    for sent in range(count):
        peer.send("token_batch", body)
        while sent - front_handler.num_received > WINDOW:
            front_handler.arrived.clear()
            await front_handler.arrived.wait()
    while front_handler.num_received < count:
        front_handler.arrived.clear()
        await front_handler.arrived.wait()
    one_way = time.process_time() - start
    for wire in wires:
        await wire.close()
    return round_trip / count * 1e6, one_way / count * 1e6


async def measure_zmq_asyncio(address: str, count: int) -> tuple[float, float]:
    """The same over `zmq.asyncio`, parsing included."""
    with zmq.asyncio.Context() as context:
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        router.bind(address)
        dealer.connect(router.getsockopt_string(zmq.LAST_ENDPOINT))
        body, stop = batch(), Stop(stream_ids=[1])
        start = time.process_time()
        for _ in range(count):
            await dealer.send_multipart([body.SerializeToString()])
            identity, data = await router.recv_multipart()
            TokenBatch.FromString(data)
            await router.send_multipart([identity, stop.SerializeToString()])
            Stop.FromString((await dealer.recv_multipart())[0])
        round_trip = time.process_time() - start
        start = time.process_time()

        async def receive() -> None:
            for _ in range(count):
                TokenBatch.FromString((await router.recv_multipart())[1])

        receiver = asyncio.create_task(receive())
        for _ in range(count):
            await dealer.send_multipart([body.SerializeToString()])
        await receiver
        one_way = time.process_time() - start
        router.close(0)
        dealer.close(0)
    return round_trip / count * 1e6, one_way / count * 1e6


@click.command()
@click.option("--messages", "count", type=click.IntRange(min=100), default=20_000, show_default=True)
def main(count: int) -> None:
    """Measure one hop."""
    logs.configure(service="bench", instance="hops", level="warning")
    table = Table(
        "link", "CPU µs a round trip", "CPU µs one way", title=f"{count} messages, a token batch of {BATCH_ROWS} rows each"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        directory = Path(path)
        create_keys(directory / "keys")
        for name, address, keys in (
            ("headrace, ipc", f"ipc://{directory}/a", None),
            ("headrace, tcp", "tcp://127.0.0.1:0", None),
            ("headrace, tcp, CURVE", "tcp://127.0.0.1:0", directory / "keys"),
        ):
            table.add_row(name, *(f"{value:.1f}" for value in uvloop.run(measure_link(address, keys, count))))
        table.add_row(
            "zmq.asyncio, ipc", *(f"{value:.1f}" for value in uvloop.run(measure_zmq_asyncio(f"ipc://{directory}/b", count)))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
