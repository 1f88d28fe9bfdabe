"""The gRPC services by which public gateways drive the system, over a real port and a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import (
    common_pb2,
    sglang_scheduler_pb2,
    sglang_scheduler_pb2_grpc,
    vllm_engine_pb2,
    vllm_engine_pb2_grpc,
)

from headrace.errors import OverloadedError, UnavailableError
from services.router.generation import Constraint, LikelyToken, OutputPiece, Sampling, TokenLogprob, TokenPrompt
from services.router.grpc.server import GrpcServer, register_sglang, register_vllm
from services.router.prefix_directory import REMOVED, STORED, LaneNews, namespace_hash
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine

PROTOCOLS = ["sglang", "vllm"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(engine: FakeEngine, protocol: str) -> AsyncIterator[Any]:
    register = {"sglang": register_sglang, "vllm": register_vllm}[protocol]
    server = GrpcServer(engine, register, host="127.0.0.1", port=0, setting="router.x", max_message_bytes=1024 * 1024)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            if protocol == "sglang":
                yield sglang_scheduler_pb2_grpc.SglangSchedulerStub(channel)
            else:
                yield vllm_engine_pb2_grpc.VllmEngineStub(channel)
    finally:
        await server.stop()


def request(protocol: str, request_id: str = "r", *, stream: bool = True, **sampling: Any) -> Any:
    pb = sglang_scheduler_pb2 if protocol == "sglang" else vllm_engine_pb2
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=[5, 6, 7]),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_streamed_tokens_are_new_ones_and_the_end_token_is_left_out(protocol: str) -> None:
    engine = FakeEngine(OutputPiece("a", (11, 12)), OutputPiece("b", (13, 99), "stop"))
    async with serving(engine, protocol) as stub:
        answers = [answer async for answer in stub.Generate(request(protocol, temperature=0.5, top_k=3))]
    assert [list(one.chunk.token_ids) for one in answers[:-1]] == [[11, 12], [13]]
    complete = answers[-1].complete
    assert (complete.finish_reason, complete.matched_token_id, list(complete.output_ids)) == ("stop", 99, [11, 12, 13])
    assert (complete.prompt_tokens, complete.completion_tokens, complete.cached_tokens) == (3, 4, 1)
    asked = engine.requests[0]
    assert isinstance(asked.prompt, TokenPrompt)
    assert asked.prompt.token_ids.tolist() == [5, 6, 7]
    assert asked.sampling.temperature == 0.5
    assert asked.sampling.top_k == 3
    assert engine.ended == [("OK", None)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_without_stream_only_completions_come_one_a_choice(protocol: str) -> None:
    engine = FakeEngine(OutputPiece("a", (1, 2), "length", 1), OutputPiece("b", (3,), "length", 0))
    async with serving(engine, protocol) as stub:
        answers = [answer async for answer in stub.Generate(request(protocol, stream=False, n=2))]
    assert [(one.complete.index, list(one.complete.output_ids)) for one in answers] == [(1, [1, 2]), (0, [3])]
    assert engine.requests[0].num_choices == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_absent_fields_are_the_protocols_defaults(protocol: str) -> None:
    engine = FakeEngine()
    async with serving(engine, protocol) as stub:
        _ = [answer async for answer in stub.Generate(request(protocol))]
    # On the older protocol a temperature of zero is not sent, and greedy; on the other one it is absent.
    older = Sampling(0.0, 1.0, None, 0.0, None, 0.0, 0.0, 1.0)
    expected = older if protocol == "sglang" else Sampling(None, 1.0, 0, 0.0, None, 0.0, 0.0, 1.0)
    assert engine.requests[0].sampling == expected
    assert engine.requests[0].stopping.max_tokens is None


async def test_constraints_keep_their_language() -> None:
    wanted = [
        ("sglang", {"json_schema": "{}"}, Constraint("json_schema", "{}", "json_schema")),
        ("sglang", {"ebnf_grammar": "root ::= a"}, Constraint("ebnf", "root ::= a", "ebnf_grammar")),
        ("vllm", {"json_object": True}, Constraint("json_object", "", "json_object")),
        ("vllm", {"grammar": "root ::= a"}, Constraint("ebnf", "root ::= a", "grammar")),
        ("vllm", {"choice": vllm_engine_pb2.ChoiceConstraint(choices=["a", "b"])}, Constraint("choice", '["a","b"]', "choice")),
        ("vllm", {"regex": "a+"}, Constraint("regex", "a+", "regex")),
    ]
    for protocol, fields, expected in wanted:
        engine = FakeEngine()
        async with serving(engine, protocol) as stub:
            _ = [answer async for answer in stub.Generate(request(protocol, **fields))]
        assert engine.requests[0].constraint == expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_penalties_bias_and_logprobs(protocol: str) -> None:
    def told(token_id: int, logprob: float | None) -> TokenLogprob:
        return TokenLogprob(token_id, b"x", logprob, (LikelyToken(token_id, b"x", -0.5), LikelyToken(4, b"y", -1.5)))

    engine = FakeEngine(
        OutputPiece("a", (11,), logprobs=(told(11, -0.5),), prompt_logprobs=(told(5, None), told(6, -2.0))),
        OutputPiece("b", (12, 99), "stop", logprobs=(told(12, -0.75), told(99, -3.0))),
    )
    key = "8" if protocol == "sglang" else 8
    asked = request(protocol, frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=1.5, logit_bias={key: -2.0})
    if protocol == "sglang":
        asked.return_logprob, asked.top_logprobs_num, asked.logprob_start_len = True, 2, 0
    else:
        asked.sampling_params.logprobs = asked.sampling_params.prompt_logprobs = 2
    async with serving(engine, protocol) as stub:
        first, second, last = [answer async for answer in stub.Generate(asked)]
    seen = engine.requests[0]
    assert seen.sampling.logit_bias == ((8, -2.0),)
    assert (seen.sampling.frequency_penalty, seen.sampling.presence_penalty, seen.sampling.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (seen.logprobs, seen.prompt_logprobs) == (2, 2)
    assert list(first.chunk.output_logprobs.token_logprobs) == [-0.5]
    assert list(first.chunk.output_logprobs.top_logprobs[0].token_ids) == [11, 4]
    prompt = first.chunk.input_logprobs.token_logprobs
    assert [one.value if one.HasField("value") else None for one in prompt] == [None, -2.0]
    assert list(second.chunk.output_logprobs.token_ids) == [12]
    assert list(last.complete.output_logprobs.token_logprobs) == [-0.5, -0.75]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_abort_ends_the_stream_with_that_reason_and_closes_it(protocol: str) -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    async with serving(engine, protocol) as stub:
        call = stub.Generate(request(protocol))
        assert (await call.read()).HasField("chunk")
        pb = sglang_scheduler_pb2 if protocol == "sglang" else vllm_engine_pb2
        names = {"request_id": "r"} if protocol == "sglang" else {"request_ids": ["r", "unknown"]}
        await stub.Abort(pb.AbortRequest(**names))
        last = await call.read()
        assert last.complete.finish_reason == "abort"
        assert await call.read() == grpc.aio.EOF
        assert engine.streams[0].num_closes >= 1
        # The same id may come again when it is over.
        engine.script = [OutputPiece("a", (1,), "stop")]
        assert [answer async for answer in stub.Generate(request(protocol))]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_cancelled_call_closes_its_stream(protocol: str) -> None:
    engine = FakeEngine(NEVER_S)
    async with serving(engine, protocol) as stub:
        call = stub.Generate(request(protocol, stream=False))
        await until(lambda: bool(engine.streams))
        call.cancel()
        await asyncio.wait_for(engine.streams[0].closed.wait(), WAIT_S)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_what_cannot_be_served_is_refused_by_name(protocol: str) -> None:
    async with serving(FakeEngine(), protocol) as stub:
        pb = sglang_scheduler_pb2 if protocol == "sglang" else vllm_engine_pb2
        wrong = [
            (request(protocol, ""), "request_id"),
            (request(protocol, top_p=2.0), "top_p"),
            (request(protocol, n=1000), "n must be"),
            (pb.GenerateRequest(request_id="r"), "input_ids" if protocol == "sglang" else "tokenized"),
        ]
        multimodal = request(protocol)
        multimodal.mm_inputs.SetInParent()
        for message, word in [*wrong, (multimodal, "mm_inputs")]:
            with pytest.raises(grpc.aio.AioRpcError, match=word) as caught:
                _ = [answer async for answer in stub.Generate(message)]
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_errors_have_the_statuses_that_gateways_act_on(protocol: str) -> None:
    engine = FakeEngine()
    async with serving(engine, protocol) as stub:
        for error, status in [
            (OverloadedError("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (UnavailableError("none"), grpc.StatusCode.UNAVAILABLE),
        ]:
            engine.refusal = error
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [answer async for answer in stub.Generate(request(protocol))]
            assert caught.value.code() == status
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.StartProfile(common_pb2.StartProfileRequest())
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_model_health_loads_and_tokenizer(protocol: str) -> None:
    engine = FakeEngine()
    pb = sglang_scheduler_pb2 if protocol == "sglang" else vllm_engine_pb2
    async with serving(engine, protocol) as stub:
        info = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.served_model_name, info.tokenizer_path, info.max_context_length) == ("m", "/models/m", 128)
        assert info.is_generation
        assert info.default_sampling_params_json == '{"temperature":0.6}'
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        engine.reason = "no worker"
        health = await stub.HealthCheck(pb.HealthCheckRequest())
        assert (health.healthy, health.message) == (False, "no worker")
        (load,) = (await stub.GetLoads(pb.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.num_waiting_reqs, load.token_usage, load.max_running_requests) == (2, 3, 0.25, 8)
        assert (await stub.FlushCache(common_pb2.FlushCacheRequest())).success
        await stub.GetServerInfo(pb.GetServerInfoRequest())
        chunks = [chunk async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
    archive = b"".join(chunk.data for chunk in chunks)
    assert len(chunks) > 1
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].sha256 == sha256(archive).hexdigest()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_the_caches_are_told_first_whole_and_then_as_they_change(protocol: str) -> None:
    engine = FakeEngine()
    start, large = namespace_hash(""), 2**64 - 1
    async with serving(engine, protocol) as stub:
        call = stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(start_sequence_number=4))
        # The head comes before there is anything to tell.
        assert await asyncio.wait_for(call.initial_metadata(), WAIT_S) is not None
        first = await call.read()
        assert (first.sequence_number, first.events[0].WhichOneof("data")) == (4, "cleared")
        tokens = b"".join(token.to_bytes(4, "little") for token in (1, 2, 3, 4))
        engine.mirror.update(1, LaneNews(0, 2, 0, ((STORED, (7, large)),), False, True, (start,), tokens))
        batch = await call.read()
        (event,) = batch.events
        assert batch.sequence_number == 5
        assert [(block.block_hash, list(block.token_ids), block.block_size) for block in event.stored.blocks] == [
            (7, [1, 2], 2),
            (-1, [3, 4], 2),
        ]
        assert not event.stored.HasField("parent_block_hash")
        engine.mirror.update(1, LaneNews(0, 2, 0, ((REMOVED, (large,)),), False, True, (0,), b""))
        assert list((await call.read()).events[0].removed.block_hashes) == [-1]
        call.cancel()
        await until(lambda: not engine.mirror.has_readers)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_tokens_are_embedded(protocol: str) -> None:
    engine = FakeEngine()
    pb = sglang_scheduler_pb2 if protocol == "sglang" else vllm_engine_pb2
    async with serving(engine, protocol) as stub:
        answer = await stub.Embed(pb.EmbedRequest(request_id="r", tokenized=pb.TokenizedInput(input_ids=[5, 6, 7])))
        assert (list(answer.embedding), answer.prompt_tokens, answer.embedding_dim) == ([3.0, 1.0], 3, 2)
        with pytest.raises(grpc.aio.AioRpcError, match="input_ids must be 1 to"):
            await stub.Embed(pb.EmbedRequest(request_id="r"))
