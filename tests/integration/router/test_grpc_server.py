"""The gRPC port for real: a channel on a free port, the reflection client, cancellation, deadlines, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from headrace.errors import ConfigError, OverloadedError
from headrace.v1 import inference_pb2, inference_pb2_grpc
from headrace.v1.common_pb2 import FINISH_REASON_STOP
from services.router.generation import OutputPiece
from services.router.grpc.server import GrpcServer, register_inference
from tests.patience import GROWING_S, NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel]]:
    server = GrpcServer(
        engine, register_inference, host="127.0.0.1", port=0, setting="router.grpc_port", max_message_bytes=1024 * 1024
    )
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, channel
    finally:
        await server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_generate_and_chat_stream_and_end_with_reason_and_usage() -> None:
    engine = FakeEngine()
    async with serving(engine) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        pieces = [piece async for piece in stub.Generate(inference_pb2.GenerateRequest(model="m", text="hi"), timeout=1000)]
        assert "".join(piece.text for piece in pieces) == "Hello!"
        assert [token for piece in pieces for token in piece.token_ids] == [1, 2, 3]
        assert pieces[-1].finish_reason == FINISH_REASON_STOP
        assert pieces[-1].usage.num_prompt_tokens == 3
        assert {piece.request_id for piece in pieces} == {"id0"}
        # What is left of it where the call arrives; on its way gRPC rounds it up, by a hundredth at most.
        assert 500 < (engine.calls[0].timeout_s or 0) <= 1010
        turns = [piece async for piece in stub.Chat(inference_pb2.ChatRequest(prompt=CHAT))]
        assert "".join(turn.content for turn in turns) == "Hello!"
        assert engine.calls[1].timeout_s is None
        assert engine.ended == [("OK", None), ("OK", None)]


async def test_a_call_is_counted_to_the_key_in_its_metadata() -> None:
    engine = FakeEngine()
    async with serving(engine) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        for metadata in ((("authorization", "Bearer secret"),), ()):
            async for _ in stub.Generate(inference_pb2.GenerateRequest(model="m", text="hi"), metadata=metadata):
                pass
    assert engine.calls[0].tenant.startswith("key:")
    assert engine.calls[1].tenant == ""


async def test_tokenize_detokenize_and_models() -> None:
    async with serving(FakeEngine()) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert list((await stub.Tokenize(inference_pb2.TokenizeRequest(text="hi"))).token_ids) == [1, 2, 3]
        assert (await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[4, 5]))).text == "4-5True"
        assert [model.name for model in (await stub.ListModels(inference_pb2.ListModelsRequest())).models] == ["m"]


@pytest.mark.parametrize(
    ("request_fields", "status", "param"),
    [
        ({"model": "m"}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "text"),
        ({"token_ids": {"ids": [2**31]}}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        ({"text": "x", "sampling": {"temperature": 3}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"text": "x", "sampling": {"top_p": float("nan")}}, grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        ({"text": "x", "stopping": {"max_tokens": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"text": "x", "model": "nope"}, grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
async def test_bad_requests_have_a_status_and_name_the_field(
    request_fields: dict[str, object], status: grpc.StatusCode, param: str
) -> None:
    async with serving(FakeEngine()) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(inference_pb2.GenerateRequest(**request_fields)):
                pass
        metadata = dict(caught.value.trailing_metadata() or ())
        assert caught.value.code() is status
        assert metadata["headrace-error-param"] == param
        assert metadata["headrace-error-code"] in {"invalid_request", "not_found"}
        assert metadata["x-request-id"] == "id0"


async def test_overload_says_when_to_come_back() -> None:
    engine = FakeEngine()
    engine.refusal = OverloadedError("full", retry_after_s=2.5)
    async with serving(engine) as (_, channel):
        call = inference_pb2_grpc.InferenceStub(channel).Chat(inference_pb2.ChatRequest(prompt=CHAT))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(await call.trailing_metadata())["headrace-retry-after-ms"] == "2500"


async def test_a_cancelled_call_closes_its_stream_at_once() -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    async with serving(engine) as (_, channel):
        call = inference_pb2_grpc.InferenceStub(channel).Chat(inference_pb2.ChatRequest(prompt=CHAT))
        assert (await call.read()).content == "a"
        call.cancel()
        await until(lambda: bool(engine.ended))
        assert engine.streams[0].num_closes >= 1
        assert engine.ended == [("CANCELLED", None)]


async def test_a_passed_deadline_closes_the_stream() -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    async with serving(engine) as (_, channel):
        for timeout_s in GROWING_S:
            call = inference_pb2_grpc.InferenceStub(channel).Chat(inference_pb2.ChatRequest(prompt=CHAT), timeout=timeout_s)
            with pytest.raises(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if engine.streams:
                break
        await until(lambda: engine.streams[0].num_closes > 0)


async def test_health_follows_readiness() -> None:
    async with serving(FakeEngine()) as (server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="headrace.v1.Inference")
        assert (await stub.Check(asked)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        assert (await stub.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_is_enough_to_stream_a_chat_without_our_stubs() -> None:
    async with serving(FakeEngine()) as (server, channel):
        asked, answer_class, names = await asyncio.to_thread(_reflect, server.port)
        assert "headrace.v1.Inference" in names
        assert "grpc.health.v1.Health" in names
        method = channel.unary_stream(
            "/headrace.v1.Inference/Chat",
            request_serializer=type(asked).SerializeToString,
            response_deserializer=answer_class.FromString,
        )
        assert "".join([answer.content async for answer in method(asked)]) == "Hello!"


def _reflect(port: int) -> tuple[object, type, list[str]]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("headrace.v1.Inference").FindMethodByName("Chat")
        asked = GetMessageClass(method.input_type)(prompt=CHAT)
        return asked, GetMessageClass(method.output_type), list(database.get_services())


async def test_a_busy_port_stops_the_start_and_names_the_setting() -> None:
    async with serving(FakeEngine()) as (server, _):
        second = GrpcServer(
            FakeEngine(), register_inference, host="127.0.0.1", port=server.port, setting="router.grpc_port", max_message_bytes=1024
        )
        with pytest.raises(ConfigError, match=rf"port {server.port} .* router.grpc_port"):
            await second.start()


async def test_embed_gives_a_vector_a_text_and_names_bad_ones() -> None:
    engine = FakeEngine()
    async with serving(engine) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        inputs = [inference_pb2.EmbedInput(text="ab"), inference_pb2.EmbedInput(token_ids={"ids": [4, 5, 6]})]
        answer = await stub.Embed(inference_pb2.EmbedRequest(model="e", inputs=inputs, dimensions=2))
        assert [list(one.values) for one in answer.embeddings] == [[2.0, 1.0], [3.0, 1.0]]
        assert (answer.num_prompt_tokens, engine.embed_requests[0].dimensions) == (5, 2)
        for bad, words in (([], "inputs must be 1 to 2048 texts"), ([inference_pb2.EmbedInput()], "inputs.0 must be a text")):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.Embed(inference_pb2.EmbedRequest(inputs=bad))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert words in (refusal.value.details() or "")
