"""The Python client over a real port and a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from headrace.errors import OverloadedError as ServerOverloadedError
from headrace_client import (
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    Model,
    NotFoundError,
    OverloadedError,
    Retries,
    UnauthenticatedError,
    UnavailableError,
    system,
    user,
)
from services.router.api_keys import ApiKeys
from services.router.generation import ConversationPrompt, OutputPiece, TextPrompt, TokenPrompt
from tests.integration.clients.served import Served
from tests.patience import NEVER_S, WAIT_S

KEY = "sk-0123456789abcdef"


@pytest.fixture
def served() -> Iterator[Served]:
    running = Served()
    yield running
    running.stop()


def test_a_chat_whole_and_in_pieces(served: Served) -> None:
    with Client(served.target, model="m", timeout_s=WAIT_S) as client:
        reply = client.chat([system("be short"), user("hello", name="ann")], temperature=0.5, max_tokens=7, stop="x", seed=3)
        assert (reply.text, reply.finish_reason, reply.token_ids) == ("Hello!", "stop", [[1, 2, 3]])
        assert reply.usage is not None
        assert (reply.usage.num_prompt_tokens, reply.usage.num_output_tokens) == (3, 3)
        assert (reply.request_id, len(reply.trace_id)) == ("id0", 32)
        with client.stream_chat([user("hello")], traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01") as stream:
            assert [piece.text for piece in stream] == ["Hel", "lo", "!"]
        assert stream.trace_id == "ab" * 16
    first, second = served.engine.requests
    assert isinstance(first.prompt, ConversationPrompt)
    assert [(turn.role, turn.content, turn.name) for turn in first.prompt.turns] == [
        ("system", "be short", ""),
        ("user", "hello", "ann"),
    ]
    assert (first.sampling.temperature, first.sampling.seed, first.stopping.max_tokens, first.stopping.stop) == (0.5, 3, 7, ("x",))
    assert second.sampling.seed is not None, "drawn by the client, so that a retry is the same"
    assert served.engine.traceparents[1] == f"00-{'ab' * 16}-{'cd' * 8}-01"


def test_choices_and_prompts_of_text_or_tokens(served: Served) -> None:
    served.engine.script = [OutputPiece("b", (2,), "stop", 1), OutputPiece("a", (1,), "length", 0)]
    with Client(served.target) as client:
        reply = client.generate("text", num_choices=2)
        assert (reply.texts, reply.finish_reasons) == (["a", "b"], ["length", "stop"])
        served.engine.script = [OutputPiece("a", (1,), "stop")]
        client.generate([4, 5])
    text, tokens = (request.prompt for request in served.engine.requests)
    assert isinstance(text, TextPrompt)
    assert isinstance(tokens, TokenPrompt)
    assert tokens.token_ids.tolist() == [4, 5]


def test_tokens_and_models(served: Served) -> None:
    with Client(served.target) as client:
        assert client.tokenize("x") == client.tokenize([user("x")]) == [1, 2, 3]
        assert client.detokenize([1, 2]) == "1-2True"
        assert client.list_models() == [Model("m", 128, 7)]


def test_errors_are_split_by_what_can_be_done(served: Served) -> None:
    with Client(served.target, retries=Retries(num=0)) as client:
        with pytest.raises(InvalidRequestError) as invalid:
            client.generate("x", top_p=7)
        assert (invalid.value.param, invalid.value.code, invalid.value.request_id) == ("top_p", "invalid_request", "id0")
        with pytest.raises(InvalidRequestError) as unknown:
            client.detokenize([2**31])
        assert unknown.value.request_id == "id1"
        client.model = "other"
        with pytest.raises(NotFoundError):
            client.generate("x")
        client.model = ""
        served.engine.refusal = ServerOverloadedError("full", retry_after_s=2.5)
        with pytest.raises(OverloadedError) as overloaded:
            client.generate("x")
        assert overloaded.value.retry_after_s == 2.5
        served.engine.refusal = None
        served.engine.script = [NEVER_S]
        with pytest.raises(DeadlineExceededError):
            client.generate("x", timeout_s=0.2)
        with pytest.raises(TypeError, match="temprature"):
            client.generate("x", temprature=1)  # type: ignore[call-arg]
    with Client("127.0.0.1:1", retries=Retries(num=1, first_wait_s=0.01)) as client, pytest.raises(UnavailableError):
        client.generate("x")


def test_a_call_that_met_a_full_queue_is_made_again_with_the_same_seed(served: Served) -> None:
    served.engine.refusal = ServerOverloadedError("full", retry_after_s=0.05)
    seeds = []
    original = served.engine.open_stream

    def open_stream(request: Any, call: Any) -> Any:
        seeds.append(request.sampling.seed)
        if len(seeds) == 3:
            served.engine.refusal = None
        return original(request, call)

    served.engine.open_stream = open_stream  # type: ignore[method-assign]
    with Client(served.target, timeout_s=WAIT_S) as client, client.stream_generate("x") as stream:
        assert stream.read().text == "Hello!"
    assert stream.num_retries == 2
    assert len(set(seeds)) == 1
    served.engine.refusal = ServerOverloadedError("full", retry_after_s=3600.0)
    with Client(served.target, timeout_s=WAIT_S) as client, pytest.raises(OverloadedError):
        client.generate("x")


def test_cancel_reaches_the_server(served: Served) -> None:
    served.engine.script = [OutputPiece("a", (1,)), NEVER_S]
    with Client(served.target) as client:
        with client.stream_generate("x") as stream:
            pieces = iter(stream)
            assert next(pieces).text == "a"
            stream.cancel()
            with pytest.raises(CancelledError):
                next(pieces)
        with client.stream_generate("x") as stream:
            assert next(iter(stream)).text == "a"
    for opened in served.engine.streams:
        served._do(asyncio.wait_for(opened.closed.wait(), WAIT_S))


async def test_asyncio_does_the_same(served: Served) -> None:
    async with AsyncClient(served.target, timeout_s=WAIT_S) as client:
        assert (await client.chat([user("hello")], temperature=0)).text == "Hello!"
        async with client.stream_generate("x") as stream:
            assert [piece.text async for piece in stream] == ["Hel", "lo", "!"]
        assert await client.tokenize("x") == [1, 2, 3]
        assert await client.detokenize([1]) == "1True"
        assert await client.list_models() == [Model("m", 128, 7)]
        with pytest.raises(InvalidRequestError) as invalid:
            await client.generate("x", top_p=7)
        assert invalid.value.request_id
        served.engine.script = [OutputPiece("a", (1,)), NEVER_S]
        async with client.stream_generate("x") as stream:
            async for piece in stream:
                assert piece.text == "a"
                break
        task = asyncio.create_task(client.generate("x"))
        while len(served.engine.streams) < 4:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for opened in served.engine.streams[-2:]:
        await asyncio.wait_for(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(opened.closed.wait(), served._loop)), WAIT_S)


def test_keys() -> None:
    served = Served(ApiKeys([KEY]))
    try:
        with Client(served.target) as client, pytest.raises(UnauthenticatedError):
            client.generate("x")
        with Client(served.target, api_key=KEY) as client:
            assert client.generate("x").text == "Hello!"
    finally:
        served.stop()


def test_the_protos_of_client_and_system_are_the_same_in_one_process() -> None:
    from headrace.v1 import inference_pb2 as ours
    from headrace_client.v1 import inference_pb2 as theirs

    assert theirs.GenerateRequest.DESCRIPTOR.full_name == ours.GenerateRequest.DESCRIPTOR.full_name
    assert theirs.DESCRIPTOR.serialized_pb == ours.DESCRIPTOR.serialized_pb
    assert grpc.StatusCode.OK.value[0] == 0


async def test_a_stream_that_is_cancelled_while_it_is_read_says_so(served: Served) -> None:
    """As the package's error, in both clients: the task that reads was not cancelled."""
    served.engine.script = [OutputPiece("a", (1,)), NEVER_S]
    with Client(served.target) as client, client.stream_generate("x") as stream, pytest.raises(CancelledError):
        for _ in stream:
            stream.cancel()
    async with AsyncClient(served.target) as client, client.stream_generate("x") as stream:
        with pytest.raises(CancelledError):
            async for _ in stream:
                stream.cancel()


async def test_messages_beyond_what_grpc_reads_by_itself(served: Served) -> None:
    """Long answers come; a request over the server's own limit is the request's fault, and not sent again."""
    served.engine.script = [OutputPiece("a" * (5 << 20), (1,), "stop")]
    with Client(served.target, timeout_s=WAIT_S) as client:
        assert len(client.generate("x").text) == 5 << 20
        with client.stream_generate("x" * 20_000) as stream, pytest.raises(InvalidRequestError, match="larger than max"):
            stream.read()
        assert stream.num_retries == 0
    async with AsyncClient(served.target, timeout_s=WAIT_S) as client:
        assert len((await client.generate("x")).text) == 5 << 20
        with pytest.raises(InvalidRequestError, match="larger than max"):
            await client.generate("x" * 20_000)
