"""The whole router over a network in memory: scripted tokenizers, schedulers and detokenizers, killed in the middle of answers."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from headrace.errors import ConfigError
from headrace.service import ServiceContext
from headrace.telemetry.traces import memory_tracer
from headrace.v1 import common_pb2, control_pb2, inference_pb2, inference_pb2_grpc, router_pb2, tokenizer_pb2
from headrace.wire import topology
from headrace.wire.envelope import int32_array
from headrace.wire.fake import FakeNetwork, FakeWire
from headrace.wire.session import Peer
from services.router import service as router_service
from services.router.config import Settings
from services.router.service import RouterService
from services.scheduler.cache_events import block_hashes, namespace_hash
from tests.patience import GROWING_S, WAIT_S

ADDRESS = "fake://router"
MODEL = common_pb2.ModelInfo(name="m", max_model_len=128, loaded_unix_s=7)


class Stage:
    """One life of a scripted service; remembers what it got."""

    def __init__(self, network: FakeNetwork, role: str, instance: str, *, models: bool = True) -> None:
        self.wire: FakeWire = network.wire(role, instance)
        self.role = role
        self.got: list[tuple[str, Any, list[memoryview]]] = []
        self.is_silent = False
        self.router: Peer | None = None
        offered = [MODEL] if models else []
        self.wire.set_load(control_pb2.Load(), control_pb2.Progress(), offered)
        register = control_pb2.Register(role=topology.ROLES[role], instance=instance, models=offered, address=f"fake://{instance}")
        back = self.wire.dial(topology.ROUTER_BACKPLANE, [ADDRESS], self, register=lambda: register)
        self.wire.set_load(control_pb2.Load(), control_pb2.Progress(), offered)
        self.back = back

    def on_peer(self, peer: Peer) -> None:
        self.router = peer

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        self.router = None

    def on_heartbeat(self, peer: Peer) -> None:
        pass

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        arm = message.WhichOneof("body")
        body = getattr(message, arm)
        self.got.append((arm, body, frames))
        if self.is_silent:
            return
        if arm == "tokenize":
            error = common_pb2.ErrorDetail(code="invalid_request", message="prompt too long", param="messages")
            if body.text == "too long":
                peer.send("tokenize_reply", router_reply(body, error=error))
            else:
                peer.send("tokenize_reply", router_reply(body, num_tokens=3), [np.array([5, 6, 7], dtype="<i4")])
        elif arm == "detokenize":
            text = "-".join(map(str, int32_array(frames[0])))
            peer.send("detokenize_reply", tokenizer_pb2_reply(body.work.request_id, text))
        elif arm == "flush_cache":
            peer.send("cache_flushed", router_pb2.CacheFlushed(call_id=body.call_id, num_pages=5))
        elif arm == "submit":
            peer.send("accepted", router_pb2.Accepted(request_id=body.work.request_id))

    def arms(self) -> list[str]:
        return [arm for arm, _, _ in self.got]

    def last(self, arm: str) -> tuple[Any, list[memoryview]]:
        return next((body, frames) for name, body, frames in reversed(self.got) if name == arm)

    def deltas(self, stream_id: int, position: int, text: str, *, finish: int = 0, num: int = 1) -> None:
        """Send output as a detokenizer."""
        assert self.router is not None
        body = router_pb2.OutputDeltas(
            stream_ids=[stream_id],
            first_positions=[position],
            num_tokens=[num],
            token_ids=[100 + position + offset for offset in range(num)],
            texts=[text],
            finish_reasons=[finish] if finish else [],
            num_cached_tokens=[2],
            enqueued_unix_ns=1,
        )
        self.router.send("output_deltas", body)


def router_reply(body: Any, **fields: Any) -> tokenizer_pb2.TokenizeReply:
    defaults = common_pb2.SamplingParams(temperature=0.25, top_k=9)
    return tokenizer_pb2.TokenizeReply(
        request_id=body.work.request_id, max_model_len=128, eos_token_ids=[2], sampling_defaults=defaults, **fields
    )


def tokenizer_pb2_reply(request_id: str, text: str) -> tokenizer_pb2.DetokenizeReply:
    return tokenizer_pb2.DetokenizeReply(request_id=request_id, text=text)


class System:
    """A router service with its ports, and stages that tests start and kill."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        self.network = FakeNetwork()
        wire = self.network.wire("router", "router-0")
        self.context = ServiceContext.for_test("router", wire, run_directory=tmp_path, wire__router_bind=ADDRESS)
        self.context.tracer, self.spans = memory_tracer("router")
        self.service = RouterService(self.context, Settings(**{"http_port": 0, "grpc_port": None, **settings}))
        self.stages: dict[str, Stage] = {}

    def start(self, role: str, instance: str, *, models: bool = True) -> Stage:
        self.stages[instance] = stage = Stage(self.network, role, instance, models=models)
        self.network.settle()
        return stage

    def kill(self, stage: Stage) -> None:
        """SIGKILL: nothing is said, and the lease runs out."""
        stage.wire.kill()
        self.network.advance(6)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.http.port}"

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.network.settle()
                await asyncio.sleep(0.005)


@asynccontextmanager
async def system(tmp_path: Path, *, stages: bool = True, **settings: Any) -> AsyncIterator[System]:
    router = System(tmp_path, **settings)
    await router.service.start()
    if stages:
        for role in ("tokenizer", "scheduler", "detokenizer"):
            router.start(role, f"{role}-0")
    try:
        yield router
    finally:
        await asyncio.wait_for(router.service.stop(), WAIT_S)


class Answer:
    """A streamed chat being read."""

    def __init__(self, router: System, **fields: Any) -> None:
        self.text = ""
        self.events: list[Any] = []
        self.status = 0
        self.headers: Any = {}
        self._router = router
        self._fields = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self._router.url}/v1/chat/completions", json=self._fields) as response,
        ):
            self.status, self.headers = response.status, response.headers
            async for line in response.content:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    self.events.append(json.loads(data))
                    for choice in self.events[-1].get("choices", ()):
                        self.text += choice["delta"].get("content", "")

    async def done(self) -> None:
        await self._router.until(self.task.done)
        await self.task

    @property
    def error(self) -> Any:
        return self.events[-1]["error"]


async def begin(router: System, **fields: Any) -> tuple[Answer, int]:
    """A chat whose stream is open and submitted; also its stream number."""
    answer = Answer(router, **fields)
    await router.until(lambda: "submit" in router.stages["scheduler-0"].arms())
    submit, _ = router.stages["scheduler-0"].last("submit")
    return answer, submit.stream_id


async def test_a_chat_passes_all_stages_with_filled_parameters_and_one_trace(tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with system(tmp_path) as router:
            answer, stream_id = await begin(router, stop="END", max_tokens=9, stream_options={"include_usage": True}, top_p=0.5)
            submit, frames = router.stages["scheduler-0"].last("submit")
            opened, history = router.stages["detokenizer-0"].last("open_stream")
            tokenize, _ = router.stages["tokenizer-0"].last("tokenize")
            assert int32_array(frames[0]).tolist() == [5, 6, 7]
            assert int32_array(history[0]).tolist() == [5, 6, 7]
            assert (submit.num_tokens, submit.num_output_tokens, opened.num_output_tokens) == (3, 0, 0)
            assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.top_k) == (0.25, 0.5, 9)
            assert submit.sampling.HasField("seed")
            assert (submit.stopping.max_tokens, list(submit.eos_token_ids), list(opened.stopping.stop)) == (9, [2], ["END"])
            assert submit.detokenizer.address == "fake://detokenizer-0"
            assert submit.detokenizer.incarnation == router.stages["detokenizer-0"].wire.incarnation
            assert opened.stream_id == stream_id
            assert tokenize.chat.messages[0].content == "hi"
            assert len({body.work.traceparent for body in (submit, opened, tokenize)}) == 1
            assert submit.work.deadline_unix_ns > submit.work.enqueued_unix_ns > 0
            router.stages["detokenizer-0"].deltas(stream_id, 0, "Par", num=2)
            router.stages["detokenizer-0"].deltas(stream_id, 2, "is", finish=common_pb2.FINISH_REASON_STOP)
            await answer.done()
            assert answer.text == "Paris"
            usage = answer.events[-1]["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 3)
            assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
            assert "abort" not in router.stages["scheduler-0"].arms()
    spans = {span.name: span for span in router.spans.get_finished_spans()}
    assert {"POST /v1/chat/completions", "chat m", "queue router-tokenizer", "queue router-detokenizer"} <= spans.keys()
    root = spans["POST /v1/chat/completions"]
    assert spans["chat m"].parent.span_id == root.context.span_id
    assert {span.context.trace_id for span in spans.values()} == {root.context.trace_id}
    assert f"{root.context.trace_id:032x}" in tokenize.work.traceparent
    line = next(line for line in lines if line["event"] == "request.finished")
    assert (line["num_prompt_tokens"], line["num_output_tokens"], line["finish_reason"]) == (3, 3, "stop")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert {"ttft_s", "tpot_s", "trace_id", "num_cached_tokens"} <= line.keys()
    metrics = generate_latest(router.context.registry).decode()
    assert 'headrace_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in metrics
    assert "headrace_output_tokens_total 3.0" in metrics
    assert "headrace_time_to_first_token_seconds_count 1.0" in metrics


async def test_a_killed_tokenizer_is_replaced_unseen(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        router.stages["tokenizer-0"].is_silent = True
        answer = Answer(router)
        await router.until(lambda: router.stages["tokenizer-0"].got)
        router.kill(router.stages["tokenizer-0"])
        router.start("tokenizer", "tokenizer-1")
        await router.until(lambda: router.stages["scheduler-0"].got)
        submit, _ = router.stages["scheduler-0"].last("submit")
        router.stages["detokenizer-0"].deltas(submit.stream_id, 0, "ok", finish=common_pb2.FINISH_REASON_STOP)
        await answer.done()
        assert answer.text == "ok"


async def test_a_killed_scheduler_is_replaced_with_all_tokens_so_far_and_the_same_seed(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer, stream_id = await begin(router)
        first, _ = router.stages["scheduler-0"].last("submit")
        router.stages["detokenizer-0"].deltas(stream_id, 0, "Par", num=2)
        await router.until(lambda: answer.text == "Par")
        router.kill(router.stages["scheduler-0"])
        other = router.start("scheduler", "scheduler-1")
        await router.until(lambda: other.got)
        again, frames = other.last("submit")
        assert int32_array(frames[0]).tolist() == [5, 6, 7, 100, 101]
        assert (again.num_tokens, again.num_output_tokens) == (5, 2)
        assert (again.stream_id, again.sampling.seed) == (stream_id, first.sampling.seed)
        router.stages["detokenizer-0"].deltas(stream_id, 2, "is", finish=common_pb2.FINISH_REASON_STOP)
        await answer.done()
        assert answer.text == "Paris"
        assert 'headrace_router_moves_total{role="scheduler"} 1.0' in generate_latest(router.context.registry).decode()


async def test_a_killed_detokenizer_is_replaced_from_the_token_history(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer, stream_id = await begin(router)
        router.stages["detokenizer-0"].deltas(stream_id, 0, "Par", num=2)
        await router.until(lambda: answer.text == "Par")
        router.kill(router.stages["detokenizer-0"])
        other = router.start("detokenizer", "detokenizer-1")
        await router.until(lambda: "redirect" in router.stages["scheduler-0"].arms())
        opened, history = other.last("open_stream")
        assert int32_array(history[0]).tolist() == [5, 6, 7, 100, 101]
        assert (opened.stream_id, opened.num_output_tokens, opened.num_sent_chars) == (stream_id, 2, 3)
        redirect, _ = router.stages["scheduler-0"].last("redirect")
        assert (redirect.from_position, redirect.detokenizer.address) == (2, "fake://detokenizer-1")
        other.deltas(stream_id, 2, "is", finish=common_pb2.FINISH_REASON_LENGTH)
        await answer.done()
        assert answer.text == "Paris"
        assert answer.events[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_gap_is_redirected_and_a_replica_that_died_is_resubmitted(tmp_path: Path) -> None:
    async with system(tmp_path, move_delay_s=0.05) as router:
        answer, stream_id = await begin(router)
        scheduler, detokenizer = router.stages["scheduler-0"], router.stages["detokenizer-0"]
        assert detokenizer.router is not None
        assert scheduler.router is not None
        detokenizer.router.send("stream_gap", router_pb2.StreamGap(stream_id=stream_id, expected_position=1))
        await router.until(lambda: "redirect" in scheduler.arms())
        assert scheduler.last("redirect")[0].from_position == 1
        request_id = scheduler.last("submit")[0].work.request_id
        dead = common_pb2.ErrorDetail(code="replica_dead", message="the lane is gone")
        scheduler.router.send("rejected", router_pb2.Rejected(request_id=request_id, error=dead))
        await router.until(lambda: scheduler.arms().count("submit") == 2)
        detokenizer.deltas(stream_id, 0, "ok", finish=common_pb2.FINISH_REASON_STOP)
        await answer.done()
        assert answer.text == "ok"


async def test_errors_of_stages_reach_the_client_with_their_status(tmp_path: Path) -> None:
    async with system(tmp_path) as router, aiohttp.ClientSession() as session:
        post = asyncio.create_task(_post(session, f"{router.url}/v1/completions", {"prompt": "too long"}))
        await router.until(post.done)
        status, body, _ = post.result()
        assert (status, body["error"]["param"], body["error"]["message"]) == (400, "messages", "prompt too long")
        answer, _ = await begin(router)
        scheduler = router.stages["scheduler-0"]
        assert scheduler.router is not None
        full = common_pb2.ErrorDetail(code="overloaded", message="queue full", retry_after_s=4)
        request_id = scheduler.last("submit")[0].work.request_id
        scheduler.router.send("rejected", router_pb2.Rejected(request_id=request_id, error=full))
        await answer.done()
        assert (answer.status, answer.headers["retry-after"]) == (429, "4")
        await router.until(lambda: "close_stream" in router.stages["detokenizer-0"].arms())


async def test_a_disconnect_frees_scheduler_and_detokenizer_at_once(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer, stream_id = await begin(router)
        router.stages["detokenizer-0"].deltas(stream_id, 0, "x")
        await router.until(lambda: answer.text)
        answer.task.cancel()
        with suppress(asyncio.CancelledError):
            await answer.task
        await router.until(lambda: "abort" in router.stages["scheduler-0"].arms())
        await router.until(lambda: "close_stream" in router.stages["detokenizer-0"].arms())
        assert list(router.stages["detokenizer-0"].last("close_stream")[0].stream_ids) == [stream_id]


async def test_the_deadline_is_an_error_and_frees_everything(tmp_path: Path) -> None:
    for timeout_s in GROWING_S:
        async with system(tmp_path, default_timeout_s=timeout_s) as router:
            answer, scheduler = Answer(router), router.stages["scheduler-0"]
            await router.until(lambda task=answer.task, stage=scheduler: task.done() or "submit" in stage.arms())
            if "submit" in scheduler.arms():
                submit, _ = scheduler.last("submit")
                router.stages["detokenizer-0"].deltas(submit.stream_id, 0, "x")
            await answer.done()
            assert answer.error["code"] == "deadline_exceeded"
            if answer.text == "x":
                await router.until(lambda stage=scheduler: "abort" in stage.arms())
                return
    pytest.fail("no answer had begun before its deadline")


async def test_a_missing_stage_is_named_after_a_bounded_wait(tmp_path: Path) -> None:
    async with system(tmp_path, unavailable_wait_s=0.2) as router:
        router.kill(router.stages["scheduler-0"])
        assert "scheduler" in (router.service.not_ready_reason() or "")
        answer = Answer(router)
        await answer.done()
        assert answer.status == 503
        assert "scheduler" in answer.error["message"]


async def test_before_any_model_is_known_a_request_is_503_and_ready_names_what_is_missing(tmp_path: Path) -> None:
    async with system(tmp_path, stages=False) as router, aiohttp.ClientSession() as session:
        status, body, headers = await _post(session, f"{router.url}/v1/completions", {"prompt": "x"})
        assert (status, body["error"]["code"], "Retry-After" in headers) == (503, "unavailable", True)
        async with session.get(f"{router.url}/ready") as response:
            assert (response.status, (await response.json())["reason"]) == (503, "no tokenizer is registered")
        async with session.get(f"{router.url}/health") as response:
            assert (await response.json())["stages"] == {"tokenizer": [], "scheduler": [], "detokenizer": []}


async def test_tokenize_and_detokenize_are_served_by_the_tokenizer(tmp_path: Path) -> None:
    async with system(tmp_path) as router, aiohttp.ClientSession() as session:
        tokenize = asyncio.create_task(_post(session, f"{router.url}/tokenize", {"prompt": "x"}))
        await router.until(tokenize.done)
        assert tokenize.result()[1] == {"count": 3, "max_model_len": 128, "tokens": [5, 6, 7]}
        assert router.stages["tokenizer-0"].last("tokenize")[0].skip_length_check
        detokenize = asyncio.create_task(_post(session, f"{router.url}/detokenize", {"tokens": [8, 9]}))
        await router.until(detokenize.done)
        assert detokenize.result()[1] == {"prompt": "8-9"}


async def test_a_full_house_is_429_with_retry_after(tmp_path: Path) -> None:
    async with system(tmp_path, max_open_requests=1) as router, aiohttp.ClientSession() as session:
        answer, stream_id = await begin(router)
        status, body, headers = await _post(session, f"{router.url}/v1/completions", {"prompt": "x"})
        assert (status, body["error"]["code"], int(headers["Retry-After"])) == (429, "overloaded", 1)
        router.stages["detokenizer-0"].deltas(stream_id, 0, "ok", finish=common_pb2.FINISH_REASON_STOP)
        await answer.done()
        assert answer.text == "ok"


async def test_a_drain_refuses_new_requests_and_finishes_open_ones(tmp_path: Path) -> None:
    async with system(tmp_path) as router, aiohttp.ClientSession() as session:
        answer, stream_id = await begin(router)
        drain = asyncio.create_task(router.service.drain())
        await asyncio.sleep(0)
        status, body, _ = await _post(session, f"{router.url}/v1/completions", {"prompt": "x"})
        assert (status, "draining" in body["error"]["message"]) == (503, True)
        assert not drain.done()
        router.stages["detokenizer-0"].deltas(stream_id, 0, "ok", finish=common_pb2.FINISH_REASON_STOP)
        await answer.done()
        await asyncio.wait_for(drain, WAIT_S)
        assert answer.text == "ok"


async def test_an_unsent_abort_is_sent_when_the_queue_has_room_again(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer, stream_id = await begin(router)
        router.stages["detokenizer-0"].deltas(stream_id, 0, "x")
        await router.until(lambda: answer.text)
        router.network.full_towards.add("scheduler-0")
        answer.task.cancel()
        await router.until(lambda: "close_stream" in router.stages["detokenizer-0"].arms())
        assert "abort" not in router.stages["scheduler-0"].arms()
        router.network.full_towards.clear()
        await router.until(lambda: "abort" in router.stages["scheduler-0"].arms())


async def test_a_client_that_never_reads_is_cut_off_and_counted(tmp_path: Path) -> None:
    async with system(tmp_path, slow_client_timeout_s=0.3, client_buffer_bytes=10_000_000) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.service.http.port, limit=1024)
        writer.transport.pause_reading()
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await router.until(lambda: "submit" in router.stages["scheduler-0"].arms())
        stream_id = router.stages["scheduler-0"].last("submit")[0].stream_id
        for position in range(60):
            router.stages["detokenizer-0"].deltas(stream_id, position, "x" * 200_000)
            router.network.settle()
            await asyncio.sleep(0.005)
        await router.until(lambda: "abort" in router.stages["scheduler-0"].arms())
        assert "headrace_router_slow_clients_total 1.0" in generate_latest(router.context.registry).decode()
        writer.close()
        del reader


async def test_grpc_shares_the_engine_follows_readiness_and_frees_on_cancel(tmp_path: Path) -> None:
    async with system(tmp_path, grpc_port=0) as router:
        server = router.service.grpc
        assert server is not None
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)

            async def is_serving() -> bool:
                answer = await health.Check(health_pb2.HealthCheckRequest(service="headrace.v1.Inference"))
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            async with asyncio.timeout(WAIT_S):
                while not await is_serving():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            request = inference_pb2.ChatRequest(prompt={"messages": [{"role": "user", "content": "hi"}]})
            call = inference_pb2_grpc.InferenceStub(channel).Chat(request, timeout=WAIT_S)
            await router.until(lambda: "submit" in router.stages["scheduler-0"].arms())
            stream_id = router.stages["scheduler-0"].last("submit")[0].stream_id
            router.stages["detokenizer-0"].deltas(stream_id, 0, "Par", num=2)
            router.network.settle()
            answer = await call.read()
            assert (answer.content, list(answer.token_ids)) == ("Par", [100, 101])
            call.cancel()
            await router.until(lambda: "abort" in router.stages["scheduler-0"].arms())
            await router.until(lambda: "close_stream" in router.stages["detokenizer-0"].arms())


async def test_garbled_output_is_dropped_and_the_request_goes_on(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer, stream_id = await begin(router)
        detokenizer = router.stages["detokenizer-0"]
        assert detokenizer.router is not None
        detokenizer.router.send("output_deltas", router_pb2.OutputDeltas(stream_ids=[stream_id, 9], token_ids=[1]))
        detokenizer.deltas(12345, 0, "nobody's")
        detokenizer.deltas(stream_id, 0, "ok", finish=common_pb2.FINISH_REASON_STOP)
        await answer.done()
        assert answer.text == "ok"


async def test_a_default_deadline_over_the_maximum_stops_the_start(tmp_path: Path) -> None:
    router = System(tmp_path, default_timeout_s=10, max_timeout_s=5)
    with pytest.raises(ConfigError, match=r"router\.default_timeout_s must be at most"):
        await router.service.start()


async def _post(session: aiohttp.ClientSession, url: str, body: Any) -> tuple[int, Any, Any]:
    async with session.post(url, json=body) as response:
        return response.status, await response.json(), response.headers


async def flush(router: System) -> tuple[int, Any]:
    """Ask for a flush; gives status and body."""

    async def ask() -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.post(f"{router.url}/flush_cache") as response:
            return response.status, await response.json()

    task = asyncio.create_task(ask())
    await router.until(task.done)
    return task.result()


async def test_a_flush_reaches_every_scheduler_and_counts_their_pages(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        second = router.start("scheduler", "scheduler-1")
        assert await flush(router) == (200, {"num_pages": 10})
        second.is_silent = True
        task = asyncio.create_task(flush(router))
        await router.until(lambda: second.arms().count("flush_cache") == 2)
        router.kill(second)
        await router.until(task.done)
        assert task.result() == (200, {"num_pages": 5}), "who is gone has nothing cached"


async def test_without_a_scheduler_there_is_nothing_to_flush(tmp_path: Path) -> None:
    async with system(tmp_path, stages=False) as router:
        status, body = await flush(router)
        assert status == 503
        assert "no scheduler" in body["error"]["message"]


async def test_the_scheduler_that_has_the_prompt_cached_gets_it(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        first = router.stages["scheduler-0"]
        assert "subscribe_cache" not in first.arms(), "with one there is no choice"
        second = router.start("scheduler", "scheduler-1")
        await router.until(lambda: "subscribe_cache" in first.arms() and "subscribe_cache" in second.arms())
        assert second.router is not None
        # Blocks of one token; the prompt is 5, 6, 7.
        hashes = block_hashes(namespace_hash(""), array("i", [5, 6, 7]).tobytes(), page_bytes=4)
        news = router_pb2.CacheEvents(
            lane=1, page_size=1, is_snapshot=True, kinds=[router_pb2.CACHE_EVENT_KIND_STORED], num_hashes=[3], hashes=hashes
        )
        for _ in range(3):
            second.router.send("cache_events", news)
            answer = Answer(router)
            num_submits = second.arms().count("submit")
            await router.until(lambda num=num_submits: second.arms().count("submit") > num)
            answer.task.cancel()
        assert "submit" not in first.arms()
        # A gap: it is asked for everything again.
        cleared = [router_pb2.CACHE_EVENT_KIND_CLEARED]
        second.router.send(
            "cache_events", router_pb2.CacheEvents(lane=1, page_size=1, first_number=9, kinds=cleared, num_hashes=[0])
        )
        await router.until(lambda: second.arms().count("subscribe_cache") == 2)


async def test_salt_and_tenant_make_the_namespace(tmp_path: Path) -> None:
    async with system(tmp_path, isolate_tenants=True) as router:
        answer, _ = await begin(router, cache_salt="s", user="tenant", priority=3)
        submit, _ = router.stages["scheduler-0"].last("submit")
        tenant = submit.tenant
        assert tenant
        assert submit.cache_namespace == f"{len(tenant)}:{tenant}s"
        assert submit.priority == 3
        answer.task.cancel()


@pytest.mark.parametrize(("limit", "max_open_requests", "is_told"), [(1024, 4096, True), (4352, 4096, False), (1024, 768, False)])
async def test_too_few_open_files_for_the_requests_that_may_be_open_are_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, max_open_requests: int, is_told: bool
) -> None:
    monkeypatch.setattr(router_service, "open_files_limit", lambda: limit)
    with capture_logs() as lines:
        async with system(tmp_path, stages=False, max_open_requests=max_open_requests):
            told = [line for line in lines if line["event"] == "open_files.limited"]
    assert [(line["log_level"], line["limit"], line["wanted"]) for line in told] == ([("warning", 1024, 4352)] if is_told else [])
