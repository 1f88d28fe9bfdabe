"""The tokenizer's shell over links in memory: a router asks, threads answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from structlog.testing import capture_logs

from headrace.errors import ModelError
from headrace.lifecycle import State
from headrace.service import ServiceContext
from headrace.supervision.child import Notifier
from headrace.telemetry import traces
from headrace.v1.common_pb2 import WorkHeader
from headrace.v1.router_pb2 import RouterInbox
from headrace.v1.tokenizer_pb2 import ChatMessage, ChatPrompt, Detokenize, DetokenizeReply, Tokenize, TokenizeReply
from headrace.wire import topology
from headrace.wire.fake import FakeNetwork
from headrace.wire.session import Peer
from services.tokenizer.config import Settings
from services.tokenizer.renderer import Renderer
from services.tokenizer.service import TokenizerService
from tests.patience import WAIT_S

# The longest that can be set: how long a child takes is for the machine to say.
SETTINGS = Settings(num_threads=1, render_timeout_s=60, constraint_timeout_s=60)


class RecordingRouter:
    """A router's side of the link."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.replies: list[tuple[Any, list[int]]] = []

    def on_peer(self, peer: Peer) -> None:
        self.peers.append(peer)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        pass

    def on_heartbeat(self, peer: Peer) -> None:
        pass

    def on_message(self, peer: Peer, message: RouterInbox, frames: list[memoryview]) -> None:
        body = getattr(message, str(message.WhichOneof("body")))
        tokens = np.frombuffer(frames[0], dtype=np.int32).tolist() if frames else []
        self.replies.append((type(body).FromString(body.SerializeToString()), tokens))


class World:
    """One tokenizer and one router."""

    def __init__(self, directory: Path, settings: Settings, tracer: traces.Tracer | None, **changes: Any) -> None:
        self.network = FakeNetwork()
        self.router = RecordingRouter()
        self.router_wire = self.network.wire("router", "router-0")
        self.router_wire.bind(topology.ROUTER_BACKPLANE, "fake://router", self.router)
        self.context = ServiceContext.for_test(
            "tokenizer",
            self.network.wire("tokenizer", "tokenizer-0"),
            run_directory=directory,
            model__name=str(directory),
            wire__router_targets=["fake://router"],
            **changes,
        )
        if tracer is not None:
            self.context.tracer = tracer
        self.service = TokenizerService(self.context, settings)

    def send(self, body: Tokenize | Detokenize, frame: list[int] | None = None) -> None:
        frames = [] if frame is None else [np.array(frame, dtype=np.int32)]
        self.router.peers[0].send("tokenize" if isinstance(body, Tokenize) else "detokenize", body, frames)
        self.network.settle()

    async def replies(self, count: int) -> list[tuple[Any, list[int]]]:
        async with asyncio.timeout(WAIT_S):
            while len(self.router.replies) < count:
                await asyncio.sleep(0.002)
                self.network.settle()
        replies, self.router.replies = self.router.replies, []
        return replies

    async def ask(self, body: Tokenize | Detokenize, frame: list[int] | None = None) -> tuple[Any, list[int]]:
        self.send(body, frame)
        return (await self.replies(1))[0]


Make = Callable[..., Awaitable[World]]


@pytest.fixture
async def make(model_directory: Path) -> AsyncIterator[Make]:
    """Starts worlds and stops their tokenizers."""
    worlds: list[World] = []

    async def make_one(settings: Settings = SETTINGS, tracer: traces.Tracer | None = None, **changes: Any) -> World:
        world = World(model_directory, settings, tracer, **changes)
        worlds.append(world)
        await world.service.start()
        world.network.advance(0.2)
        return world

    yield make_one
    for world in worlds:
        await world.service.stop()


def _work(**fields: Any) -> WorkHeader:
    return WorkHeader(request_id="r1", **fields)


def _chat(*contents: str, **fields: Any) -> ChatPrompt:
    roles = ("user", "assistant")
    messages = [ChatMessage(role=roles[index % 2], content=content) for index, content in enumerate(contents)]
    return ChatPrompt(messages=messages, **fields)


def _text(tokens: list[int], world_tokens: str) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(world_tokens).decode(tokens, skip_special_tokens=False)


async def test_each_kind_of_prompt_becomes_tokens(make: Make, tiny_tokenizer_json: str) -> None:
    world = await make()
    assert world.service.not_ready_reason() is None
    reply, tokens = await world.ask(Tokenize(work=_work(), model="tiny", text="ab"))
    assert isinstance(reply, TokenizeReply)
    assert _text(tokens, tiny_tokenizer_json) == "<s>ab"
    assert (reply.request_id, reply.num_tokens, reply.max_model_len, list(reply.eos_token_ids)) == ("r1", 3, 64, [257])
    assert (reply.sampling_defaults.temperature, reply.sampling_defaults.top_k) == (0.5, 20)
    assert not reply.sampling_defaults.HasField("top_p")
    _, tokens = await world.ask(Tokenize(work=_work(), model="tiny", text="ab", add_special_tokens=False))
    assert _text(tokens, tiny_tokenizer_json) == "ab"
    _, tokens = await world.ask(Tokenize(work=_work(), model="tiny", chat=_chat("Hi")))
    assert _text(tokens, tiny_tokenizer_json) == "<s>user\nHi</s>\n<s>assistant\n"
    _, tokens = await world.ask(Tokenize(work=_work(), model="tiny", chat=_chat("Hi", "I a", continue_final_message=True)))
    assert _text(tokens, tiny_tokenizer_json) == "<s>user\nHi</s>\n<s>assistant\nI a"
    _, tokens = await world.ask(Tokenize(work=_work(), model="tiny", chat=_chat("Hi", add_generation_prompt=False)))
    assert _text(tokens, tiny_tokenizer_json) == "<s>user\nHi</s>\n"
    _, tokens = await world.ask(Tokenize(work=_work(), model="tiny", num_token_ids=3), [5, 0, 259])
    assert tokens == [5, 0, 259]


async def test_a_reply_to_a_conversation_says_how_the_output_is_to_be_read(make: Make, model_directory: Path) -> None:
    config = {
        "chat_template": "{{ tools }}<tool_call>{{ messages[0].content }}{% if thinks %}<think>{% endif %}",
        "bos_token": "<s>",
    }
    (model_directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    world = await make()
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="hi")])
    reply, _ = await world.ask(Tokenize(work=_work(), model="tiny", chat=chat))
    assert (reply.formats.tool_format, reply.formats.reasoning_format) == ("hermes", "qwen3")
    assert not reply.formats.starts_in_reasoning
    assert len(reply.formats.reasoning_end_token_ids) == len("\n</think>\n\n")
    chat.template_kwargs = '{"thinks": true}'
    reply, _ = await world.ask(Tokenize(work=_work(), model="tiny", chat=chat))
    assert reply.formats.starts_in_reasoning


async def test_tokens_become_text(make: Make) -> None:
    world = await make()
    _, tokens = await world.ask(Tokenize(work=_work(), model="tiny", text="größe"))
    reply, _ = await world.ask(Detokenize(work=_work(), model="tiny"), tokens)
    assert isinstance(reply, DetokenizeReply)
    assert reply.text == "größe"
    reply, _ = await world.ask(Detokenize(work=_work(), model="tiny", skip_special_tokens=False), tokens)
    assert reply.text == "<s>größe"


@pytest.mark.parametrize(
    ("fields", "frame", "code", "param", "pattern"),
    [
        ({"text": "x" * 70}, None, "context_length_exceeded", "prompt", "resulted in 71 tokens"),
        ({"text": "x", "max_tokens": 63}, None, "context_length_exceeded", "max_tokens", "requested 65"),
        ({"chat": _chat("x" * 70)}, None, "context_length_exceeded", "messages", "maximum context length is 64"),
        ({"chat": ChatPrompt()}, None, "invalid_request", "messages", "at least 1"),
        ({"num_token_ids": 1}, [300], "invalid_request", "prompt", "token id 300 at index 0"),
        ({"num_token_ids": 2}, [1], "protocol_error", "", "holds 1, 2 were announced"),
        ({"num_token_ids": 1}, None, "protocol_error", "", "no bytes"),
        ({}, None, "protocol_error", "", "no prompt"),
        ({"text": "x", "model": "other"}, None, "not_found", "model", "'other' is not served here; 'tiny' is"),
    ],
)
async def test_a_refusal_names_code_field_and_limit(
    make: Make, fields: dict[str, Any], frame: list[int] | None, code: str, param: str, pattern: str
) -> None:
    world = await make()
    reply, tokens = await world.ask(Tokenize(work=_work(), **{"model": "tiny", **fields}), frame)
    assert (reply.error.code, reply.error.param, tokens) == (code, param, [])
    assert pattern in reply.error.message
    # And the next request is served.
    reply, _ = await world.ask(Tokenize(work=_work(), model="tiny", text="ab"))
    assert not reply.HasField("error")


async def test_the_length_check_can_be_skipped(make: Make) -> None:
    reply, tokens = await (await make()).ask(Tokenize(work=_work(), model="tiny", text="x" * 70, skip_length_check=True))
    assert not reply.HasField("error")
    assert len(tokens) == 71


async def test_the_setting_lowers_the_context_length(make: Make) -> None:
    reply, _ = await (await make(model__max_model_len=10)).ask(Tokenize(work=_work(), model="tiny", text="x" * 10))
    assert "maximum context length is 10 tokens" in reply.error.message


async def test_a_model_without_a_template_says_what_to_do(make: Make, model_directory: Path) -> None:
    (model_directory / "tokenizer_config.json").unlink()
    reply, _ = await (await make()).ask(Tokenize(work=_work(), model="tiny", chat=_chat("Hi")))
    assert reply.error.code == "invalid_request"
    assert "the model tiny has no chat template; send the whole text as a prompt" in reply.error.message


async def test_a_passed_deadline_is_answered_without_encoding(make: Make) -> None:
    world = await make()
    reply, _ = await world.ask(Tokenize(work=_work(deadline_unix_ns=time.time_ns() - 1), model="tiny", text="ab"))
    assert reply.error.code == "deadline_exceeded"
    assert world.service.progress().num_steps == 0


async def test_a_full_queue_refuses_with_a_time_to_retry(make: Make) -> None:
    # One thread, one place to wait: of three requests sent at once, before the thread can answer any, the last is refused.
    world = await make(Settings(num_threads=1, queue_max=1))
    for _ in range(3):
        world.router.peers[0].send("tokenize", Tokenize(work=_work(), model="tiny", text="ab"))
    world.network.settle()
    replies = [reply for reply, _ in await world.replies(3)]
    refused = [reply.error for reply in replies if reply.HasField("error")]
    assert [error.code for error in refused] == ["overloaded"]
    assert refused[0].retry_after_s > 0
    assert world.service.load().num_waiting == 0


async def test_drain_answers_what_is_open_and_refuses_more(make: Make) -> None:
    world = await make()
    world.send(Tokenize(work=_work(), model="tiny", text="ab"))
    drain = asyncio.create_task(world.service.drain())
    await asyncio.sleep(0)
    world.send(Tokenize(work=_work(), model="tiny", text="ab"))
    await asyncio.wait_for(drain, WAIT_S)
    codes = [reply.error.code for reply, _ in await world.replies(2)]
    assert sorted(codes) == ["", "unavailable"]


async def test_a_reply_to_a_router_that_is_gone_is_dropped_and_counted(make: Make) -> None:
    world = await make()
    world.send(Tokenize(work=_work(), model="tiny", text="ab"))
    world.router_wire.kill()
    async with asyncio.timeout(WAIT_S):
        while world.service.progress().num_steps == 0:  # noqa: ASYNC110 (nothing signals it)
            await asyncio.sleep(0.002)
    labels = {"kind": "text", "outcome": "unanswered"}
    assert world.context.registry.get_sample_value("headrace_tokenizer_requests_total", labels) == 1


async def test_a_start_that_waits_for_its_renderers_tells_log_and_supervisor(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Supervisor:
        def state(self, state: State, detail: str = "") -> None:
            told.append((state, detail))

        def progress(self, counters: dict[str, float]) -> None:
            told.append(dict(counters))

    started = Renderer.start

    def start_slowly(self: Renderer, on_wait: Callable[[str], None]) -> None:
        on_wait("it is slow")
        started(self, lambda reason: None)

    monkeypatch.setattr(Renderer, "start", start_slowly)
    world = World(model_directory, Settings(num_threads=2), None)
    world.context.notifier = cast("Notifier", Supervisor())
    with capture_logs() as lines:
        await world.service.start()
    await world.service.stop()
    slow = (State.STARTING, "it is slow")
    # Counters that change are what makes the supervisor wait on.
    assert told == [slow, {"num_waits": 1}, slow, {"num_waits": 2}]
    assert [line["reason"] for line in lines if line["event"] == "renderer.awaited"] == ["it is slow"] * 2


async def test_spans_cover_the_queue_and_the_encoding(make: Make) -> None:
    tracer, exporter = traces.memory_tracer()
    world = await make(tracer=tracer)
    parent = tracer.start("root", root=True)
    work = _work(traceparent=parent.context.traceparent, enqueued_unix_ns=time.time_ns())
    await world.ask(Tokenize(work=work, model="tiny", chat=_chat("Hi")))
    parent.end()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"root", "queue router-tokenizer", "tokenizer.encode"}
    encode = spans["tokenizer.encode"]
    assert encode.parent.span_id == spans["root"].context.span_id
    assert encode.attributes["headrace.num_tokens"] == 21
    assert encode.attributes["headrace.render_ns"] > 0
    assert encode.attributes["headrace.encode_ns"] > 0
    tracer.close()


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be loaded"),
        ("tokenizer.json", None, r"tokenizer\.json: cannot be read"),
        ("config.json", "{", r"config\.json: cannot be read"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% for %}"}), "chat template cannot be compiled"),
    ],
)
async def test_a_corrupt_model_directory_stops_the_start(
    make: Make, model_directory: Path, file: str, content: str | None, pattern: str
) -> None:
    if content is None:
        (model_directory / file).unlink()
    else:
        (model_directory / file).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=pattern):
        await make()


async def test_a_vocabulary_larger_than_the_models_stops_the_start(make: Make, model_directory: Path) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    (model_directory / "config.json").write_text(json.dumps({**config, "vocab_size": 258, "eos_token_id": 1}))
    await make()
    (model_directory / "config.json").write_text(json.dumps({**config, "vocab_size": 257, "eos_token_id": 1}))
    with pytest.raises(ModelError, match=r"258 tokens, but config\.json says vocab_size 257"):
        await make()
