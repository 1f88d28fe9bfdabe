"""The HTTP port for real: uvicorn on a free port, the official client, raw sockets that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import openai
import pytest

from headrace.errors import ConfigError
from services.router.generation import OutputPiece
from services.router.http.app import HttpApp
from services.router.http.exchange import HttpLimits
from services.router.http.server import MAX_HEAD_BYTES, HttpServer
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine

LIMITS = HttpLimits(max_body_bytes=1024 * 1024, body_timeout_s=WAIT_S, max_timeout_s=WAIT_S, send_timeout_s=WAIT_S)


@asynccontextmanager
async def serving(engine: FakeEngine, *, head_timeout_s: float = WAIT_S) -> AsyncIterator[HttpServer]:
    server = HttpServer(HttpApp(engine, LIMITS), host="127.0.0.1", port=0, keep_alive_s=WAIT_S, head_timeout_s=head_timeout_s)
    await server.start()
    try:
        yield server
    finally:
        await asyncio.wait_for(server.stop(), WAIT_S)


async def ask(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), WAIT_S)
    finally:
        writer.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def post(body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
STREAM = post(json.dumps({**CHAT, "stream": True}).encode())


async def test_the_official_client_gets_whole_and_streamed_answers() -> None:
    async with (
        serving(FakeEngine()) as server,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], user="me")
        assert whole.choices[0].message.content == "Hello!"
        assert whole.usage is not None
        assert whole.usage.total_tokens == 6
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello!"
        assert chunks[-1].usage is not None
        completion = await client.completions.create(model="m", prompt="hi")
        assert completion.choices[0].text == "Hello!"
        assert [model.id async for model in client.models.list()] == ["m"]
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], temperature=9)


async def test_a_closed_connection_closes_the_stream() -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    async with serving(engine) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(STREAM)
        assert b"200 OK" in await reader.readline()
        writer.transport.abort()
        await until(lambda: bool(engine.ended))
        assert engine.streams[0].num_closes >= 1
        assert engine.ended == [("499", "aborted")]


async def test_a_body_of_100_mb_is_refused_while_others_go_on() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        big = asyncio.create_task(asyncio.to_thread(_send_big, server.port))
        answer = await ask(server.port, post(json.dumps(CHAT).encode()).replace(b"Host: x", b"Host: x\r\nConnection: close"))
        assert b"Hello!" in answer
        assert b" 413 " in await asyncio.wait_for(big, WAIT_S)


def _send_big(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        answer = connection.recv(65536)
        # The answer is there before the body; the connection still takes what the client goes on to send.
        for _ in range(100):
            connection.sendall(b"x" * 1_000_000)
        return answer


async def test_a_client_that_never_reads_blocks_nobody_and_can_be_cut() -> None:
    engine = FakeEngine(*[OutputPiece("x" * 100_000, (1,)) for _ in range(200)], OutputPiece("", (), "stop"))
    async with serving(engine) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.transport.pause_reading()
        writer.write(STREAM)
        await until(lambda: bool(engine.streams) and engine.streams[0].num_output_tokens > 3)
        engine.script = [OutputPiece("Hello", (1,), "stop")]
        answer = await ask(server.port, post(json.dumps(CHAT).encode()).replace(b"Host: x", b"Host: x\r\nConnection: close"))
        assert b"Hello" in answer
        assert not engine.streams[0].num_closes
        cut = engine.calls[0].cut
        assert cut is not None
        cut()
        await until(lambda: len(engine.ended) == 2)
        assert engine.streams[0].num_closes >= 1
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"y" * (MAX_HEAD_BYTES + 10) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X%d: yyyyy\r\n" % number for number in range(8000)) + b"\r\n",
    ],
)
async def test_what_is_no_request_gets_one_error_and_a_closed_connection(data: bytes) -> None:
    async with serving(FakeEngine()) as server:
        answer = await ask(server.port, data)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
        assert b"alive" in await ask(server.port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["new", "used"])
async def test_a_head_that_never_ends_is_not_waited_for(before: bytes) -> None:
    """Method: bytes that go on trickling in, on a connection that has had an answer or not; nothing else would end it."""
    async with serving(FakeEngine(), head_timeout_s=0.05) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(before)
        if before:
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"}"), WAIT_S)
        writer.write(b"GET /health HTTP/1.1\r\nX: ")

        async def trickle() -> None:
            while not writer.transport.is_closing():
                writer.write(b"y")
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        try:
            assert b"HTTP/1.1" not in await asyncio.wait_for(reader.read(), WAIT_S)
        except ConnectionResetError:
            # Closed with bytes of ours unread.
            assert reader.at_eof() or reader.exception() is not None
        finally:
            trickling.cancel()
            writer.transport.abort()


async def test_the_time_of_a_head_cuts_no_answer_and_no_pause_between_requests() -> None:
    engine = FakeEngine(OutputPiece("Hello", (1,)), 0.3, OutputPiece("!", (1,), "stop"))
    async with serving(engine, head_timeout_s=0.05) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(2):
            writer.write(post(json.dumps(CHAT).encode()))
            assert b"Hello!" in await asyncio.wait_for(reader.readuntil(b"}}"), WAIT_S)
            await asyncio.sleep(0.2)
        writer.close()


async def test_a_busy_port_stops_the_start_and_names_the_setting() -> None:
    async with serving(FakeEngine()) as server:
        second = HttpServer(HttpApp(FakeEngine(), LIMITS), host="127.0.0.1", port=server.port, keep_alive_s=5, head_timeout_s=5)
        with pytest.raises(ConfigError, match=rf"port {server.port} .* router.http_port"):
            await second.start()
