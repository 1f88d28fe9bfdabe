"""The detokenizer's shell over links in memory: a router and a scheduler talk to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from headrace.service import ServiceContext
from headrace.telemetry import traces
from headrace.v1.common_pb2 import FinishReason, StoppingParams, WorkHeader
from headrace.v1.control_pb2 import Register, Role
from headrace.v1.detokenizer_pb2 import CloseStream, OpenStream, TokenBatch
from headrace.wire import topology
from headrace.wire.fake import FakeNetwork
from headrace.wire.session import Peer
from services.detokenizer.config import Settings
from services.detokenizer.service import DetokenizerService
from tests.patience import WAIT_S

MODEL = "tiny"
LENGTH = FinishReason.FINISH_REASON_LENGTH


class Recorder:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.lost: list[str] = []
        self.messages: list[Any] = []

    def on_peer(self, peer: Peer) -> None:
        self.peers.append(peer)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        self.lost.append(peer.instance)

    def on_heartbeat(self, peer: Peer) -> None:
        pass

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        body = getattr(message, message.WhichOneof("body"))
        self.messages.append(type(body).FromString(body.SerializeToString()))

    def take(self) -> list[Any]:
        messages, self.messages = self.messages, []
        return messages


def _register_scheduler() -> Register:
    return Register(role=Role.ROLE_SCHEDULER, instance="scheduler-0")


class World:
    """One detokenizer, one router, one scheduler."""

    def __init__(self, directory: Path, *, settings: Settings | None = None, tracer: traces.Tracer | None = None) -> None:
        self.network = FakeNetwork()
        self.router, self.scheduler = Recorder(), Recorder()
        self.router_wire = self.network.wire("router", "router-0")
        self.router_wire.bind(topology.ROUTER_BACKPLANE, "fake://router", self.router)
        self.scheduler_wire = self.network.wire("scheduler", "scheduler-0")
        wire = self.network.wire("detokenizer", "detokenizer-0")
        context = ServiceContext.for_test(
            "detokenizer",
            wire,
            run_directory=directory,
            model__name=str(directory / MODEL),
            wire__router_targets=["fake://router"],
            wire__detokenizer_bind="fake://detokenizer",
        )
        if tracer is not None:
            context.tracer = tracer
        self.service = DetokenizerService(context, settings or Settings())

    async def start(self) -> World:
        await self.service.start()
        self.network.advance(0.2)
        self.detokenizer = self.router.peers[0]
        assert self.detokenizer.address == "fake://detokenizer"
        self.back = self.scheduler_wire.dial(
            topology.DETOKENIZER_BACKPLANE, [self.detokenizer.address], self.scheduler, register=_register_scheduler
        )
        self.network.advance(0.2)
        return self

    def open(self, stream_id: int, *, history: list[int] | None = None, work: WorkHeader | None = None, **fields: Any) -> None:
        body = OpenStream(work=work or WorkHeader(request_id="r"), stream_id=stream_id, model=MODEL)
        for name, value in fields.items():
            if isinstance(value, StoppingParams):
                body.stopping.CopyFrom(value)
            else:
                setattr(body, name, value)
        frames = [] if history is None else [np.array(history, dtype=np.int32)]
        self.detokenizer.send("open_stream", body, frames)
        self.network.settle()

    def tokens(self, batch: TokenBatch) -> None:
        peer = self.back.peer_at("fake://detokenizer")
        assert peer is not None
        peer.send("token_batch", batch)
        self.network.settle()


@pytest.fixture
def model_directory(tmp_path: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> Path:
    (tmp_path / MODEL).mkdir()
    tokenizers_by_kind["byte_level"].save(str(tmp_path / MODEL / "tokenizer.json"))
    (tmp_path / MODEL / "config.json").write_text("{}")
    return tmp_path


def _id(tokenizers: dict[str, Tokenizer], character: str) -> int:
    token_id = tokenizers["byte_level"].token_to_id(character)
    assert token_id is not None
    return token_id


async def test_one_batch_becomes_one_message_a_router(model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    world = await World(model_directory).start()
    assert world.service.not_ready_reason() is None
    a, b = _id(tokenizers_by_kind, "a"), _id(tokenizers_by_kind, "b")
    world.open(1)
    world.open(2)
    world.tokens(TokenBatch(stream_ids=[1, 2], first_positions=[0, 0], token_ids=[a, b]))
    (deltas,) = world.router.take()
    assert (list(deltas.stream_ids), list(deltas.texts), list(deltas.token_ids)) == ([1, 2], ["a", "b"], [a, b])
    assert not deltas.num_tokens
    assert not deltas.finish_reasons
    world.tokens(TokenBatch(stream_ids=[2], first_positions=[1], token_ids=[a], finish_reasons=[LENGTH]))
    (deltas,) = world.router.take()
    assert list(deltas.finish_reasons) == [LENGTH]
    assert world.service.load().num_running == 1
    await world.service.stop()


async def test_a_stop_string_is_told_to_the_scheduler_and_the_router(
    model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    world = await World(model_directory).start()
    world.open(7, stopping=StoppingParams(stop=["b"]))
    ids = [_id(tokenizers_by_kind, character) for character in "abc"]
    world.tokens(TokenBatch(stream_ids=[7], first_positions=[0], num_tokens=[3], token_ids=ids))
    (stop,) = world.scheduler.take()
    assert list(stop.stream_ids) == [7]
    (deltas,) = world.router.take()
    assert (list(deltas.texts), list(deltas.num_tokens)) == (["a"], [2])
    assert list(deltas.finish_reasons) == [FinishReason.FINISH_REASON_STOP]
    await world.service.stop()


async def test_a_reopened_stream_goes_on_after_its_history(model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    world = await World(model_directory).start()
    ids = [_id(tokenizers_by_kind, character) for character in "xabc"]
    world.open(3, history=ids[:3], num_output_tokens=2, num_sent_chars=1)
    (deltas,) = world.router.take()
    assert (list(deltas.texts), list(deltas.first_positions), list(deltas.num_tokens)) == (["b"], [2], [0])
    world.tokens(TokenBatch(stream_ids=[3], first_positions=[2], token_ids=ids[3:]))
    assert [list(message.texts) for message in world.router.take()] == [["c"]]
    world.tokens(TokenBatch(stream_ids=[3], first_positions=[5], token_ids=ids[:1]))
    (gap,) = world.router.take()
    assert (gap.stream_id, gap.expected_position) == (3, 3)
    await world.service.stop()


@pytest.mark.parametrize(
    ("fields", "history"), [({"model": "other"}, None), ({"num_output_tokens": 2}, [1]), ({"num_output_tokens": 1}, [-5])]
)
async def test_a_stream_that_cannot_be_opened_ends_with_an_error(
    model_directory: Path, fields: dict[str, Any], history: list[int] | None
) -> None:
    world = await World(model_directory).start()
    world.open(3, history=history, **fields)
    (deltas,) = world.router.take()
    assert list(deltas.finish_reasons) == [FinishReason.FINISH_REASON_ERROR]
    assert world.service.load().num_running == 0
    await world.service.stop()


async def test_a_contradicting_batch_is_refused_and_others_go_on(
    model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    world = await World(model_directory).start()
    world.open(1)
    world.tokens(TokenBatch(stream_ids=[1], first_positions=[0], token_ids=[5, 6]))
    assert world.router.take() == []
    world.tokens(TokenBatch(stream_ids=[1], first_positions=[0], token_ids=[_id(tokenizers_by_kind, "a")]))
    assert [list(message.texts) for message in world.router.take()] == [["a"]]
    await world.service.stop()


async def test_a_router_that_does_not_read_gets_everything_later(
    model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    world = await World(model_directory, settings=Settings(resend_interval_s=0.001)).start()
    world.open(1)
    world.network.full_towards.add("router-0")
    ids = [_id(tokenizers_by_kind, character) for character in "abc"]
    for position, token_id in enumerate(ids):
        world.tokens(TokenBatch(stream_ids=[1], first_positions=[position], token_ids=[token_id]))
    assert world.router.take() == []
    world.network.full_towards.clear()
    async with asyncio.timeout(WAIT_S):
        while not world.router.messages:
            await asyncio.sleep(0.002)
            world.network.settle()
    (deltas,) = world.router.take()
    assert (list(deltas.texts), list(deltas.num_tokens), list(deltas.token_ids)) == (["abc"], [3], ids)
    await world.service.stop()


async def test_large_batches_are_decoded_in_several_turns_in_order(
    model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    world = await World(model_directory, settings=Settings(callback_tokens_max=2)).start()
    ids = [_id(tokenizers_by_kind, character) for character in "abcde"]
    for stream_id in range(5):
        world.open(stream_id)
    world.tokens(TokenBatch(stream_ids=range(5), first_positions=[0] * 5, token_ids=ids))
    # Arrives while the first batch waits its turns, and must not overtake it.
    world.tokens(TokenBatch(stream_ids=[4], first_positions=[1], token_ids=ids[:1]))
    async with asyncio.timeout(WAIT_S):
        while world.service.progress().oldest_waiting_age_ns:  # noqa: ASYNC110 (nothing signals it)
            await asyncio.sleep(0)
    world.network.settle()
    texts: dict[int, str] = {}
    messages = world.router.take()
    for message in messages:
        for stream_id, text in zip(message.stream_ids, message.texts, strict=True):
            texts[stream_id] = texts.get(stream_id, "") + text
    assert len(messages) > 2
    assert texts == {0: "a", 1: "b", 2: "c", 3: "d", 4: "ea"}
    await world.service.stop()


async def test_a_backlog_over_its_bound_drops_the_batch(model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    world = await World(model_directory, settings=Settings(callback_tokens_max=1, backlog_tokens_max=4)).start()
    a = _id(tokenizers_by_kind, "a")
    for stream_id in range(5):
        world.open(stream_id)
    world.tokens(TokenBatch(stream_ids=range(5), first_positions=[0] * 5, token_ids=[a] * 5))
    assert world.service.load().num_waiting_tokens == 0
    world.tokens(TokenBatch(stream_ids=[0], first_positions=[1], token_ids=[a]))
    (gap,) = world.router.take()
    assert (gap.stream_id, gap.expected_position) == (0, 0)
    await world.service.stop()


async def test_closed_streams_and_lost_routers_leave_nothing_and_drain_ends(
    model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    world = await World(model_directory).start()
    world.open(1)
    world.open(2)
    drain = asyncio.create_task(world.service.drain())
    await asyncio.sleep(0)
    world.detokenizer.send("close_stream", CloseStream(stream_ids=[1, 99]))
    world.network.settle()
    assert world.service.load().num_running == 1
    assert not drain.done()
    world.router_wire.kill()
    world.network.advance(10)
    assert world.service.load().num_running == 0
    await asyncio.wait_for(drain, WAIT_S)
    assert world.service.not_ready_reason() == "no router has answered yet"
    await world.service.stop()


async def test_a_traced_stream_has_spans_of_both_queues_and_of_its_life(
    model_directory: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tracer, exporter = traces.memory_tracer()
    world = await World(model_directory, tracer=tracer).start()
    parent = tracer.start("root", root=True)
    work = WorkHeader(request_id="r1", traceparent=parent.context.traceparent, enqueued_unix_ns=1)
    world.open(1, work=work)
    a = _id(tokenizers_by_kind, "a")
    world.tokens(TokenBatch(stream_ids=[1], first_positions=[0], token_ids=[a], enqueued_unix_ns=1))
    world.tokens(TokenBatch(stream_ids=[1], first_positions=[1], token_ids=[a], enqueued_unix_ns=1, finish_reasons=[LENGTH]))
    parent.end()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"root", "queue router-detokenizer", "queue detokenizer-scheduler", "detokenizer.stream"}
    root = spans.pop("root")
    assert all(span.parent.span_id == root.context.span_id for span in spans.values())
    assert spans["detokenizer.stream"].attributes["headrace.num_tokens"] == 2
    await world.service.stop()
    tracer.close()
