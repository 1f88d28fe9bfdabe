"""Several choices of one request: one prompt, encoded once, and an answer that has all of them or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from headrace.v1 import common_pb2, inference_pb2, inference_pb2_grpc, router_pb2, tokenizer_pb2
from tests.integration.router.test_router_service import Answer, Stage, System, system

STOP = common_pb2.FINISH_REASON_STOP
NUM_CHOICES = 3


def submits(router: System, instance: str = "scheduler-0") -> list[Any]:
    return [body for arm, body, _ in router.stages[instance].got if arm == "submit"]


async def begin(router: System, **fields: Any) -> tuple[Answer, list[int]]:
    """A chat of three choices that are all submitted; also their stream numbers."""
    answer = Answer(router, n=NUM_CHOICES, **fields)
    await router.until(lambda: len(submits(router)) == NUM_CHOICES)
    return answer, [submit.stream_id for submit in submits(router)]


def texts(answer: Answer) -> list[str]:
    found = [""] * NUM_CHOICES
    for event in answer.events:
        for choice in event["choices"]:
            found[choice["index"]] += choice["delta"].get("content", "")
    return found


def detokenizer(router: System) -> Stage:
    return router.stages["detokenizer-0"]


async def test_choices_share_tokens_and_scheduler_and_count_their_prompt_once(tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with system(tmp_path) as router:
            router.start("scheduler", "scheduler-1")
            answer, streams = await begin(router, seed=7, stream_options={"include_usage": True})
            assert router.stages["tokenizer-0"].arms() == ["tokenize"]
            assert not submits(router, "scheduler-1"), "they can fork where the first one is only"
            sent = submits(router)
            request_id = sent[0].work.request_id
            assert [submit.work.request_id for submit in sent] == [request_id, f"{request_id}-1", f"{request_id}-2"]
            assert [submit.fork_group for submit in sent] == [request_id] * NUM_CHOICES
            assert [submit.sampling.seed for submit in sent] == [7, 8, 9]
            assert len(set(streams)) == NUM_CHOICES
            for index, stream_id in enumerate(streams):
                detokenizer(router).deltas(stream_id, 0, f"choice {index}", num=2)
            for stream_id in reversed(streams):
                detokenizer(router).deltas(stream_id, 2, "!", finish=STOP)
            await answer.done()
    assert texts(answer) == ["choice 0!", "choice 1!", "choice 2!"]
    usage = answer.events[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 9, 12)
    assert answer.headers["x-request-id"] == request_id
    (line,) = [line for line in lines if line["event"] == "request.finished"]
    assert (line["num_choices"], line["num_prompt_tokens"], line["num_output_tokens"]) == (3, 3, 9)
    metrics = generate_latest(router.context.registry).decode()
    assert "headrace_prompt_tokens_total 3.0" in metrics
    assert "headrace_output_tokens_total 9.0" in metrics
    assert "headrace_time_to_first_token_seconds_count 1.0" in metrics
    # Two tokens at once are one gap, and one to the last.
    assert "headrace_inter_token_latency_seconds_count 6.0" in metrics
    assert router.service.gateway.turnstile.num_open == 0


async def test_one_alone_is_of_no_group(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer = Answer(router, n=1)
        await router.until(lambda: submits(router))
        assert submits(router)[0].fork_group == ""
        detokenizer(router).deltas(submits(router)[0].stream_id, 0, "ok", finish=STOP)
        await answer.done()


async def test_a_disconnect_frees_all_choices(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer, streams = await begin(router)
        for stream_id in streams:
            detokenizer(router).deltas(stream_id, 0, "x")
        await router.until(lambda: answer.text == "xxx")
        answer.task.cancel()
        scheduler = router.stages["scheduler-0"]
        await router.until(lambda: scheduler.arms().count("abort") == NUM_CHOICES)
        await router.until(lambda: detokenizer(router).arms().count("close_stream") == NUM_CHOICES)
        await router.until(lambda: not router.service.gateway.turnstile.num_open)


async def test_a_disconnect_before_there_are_tokens_opens_no_choice(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        router.stages["tokenizer-0"].is_silent = True
        answer = Answer(router, n=NUM_CHOICES)
        await router.until(lambda: router.stages["tokenizer-0"].got)
        assert router.service.gateway.turnstile.num_open == NUM_CHOICES
        answer.task.cancel()
        await router.until(lambda: not router.service.gateway.turnstile.num_open)
        assert not router.stages["scheduler-0"].got


async def test_a_choice_that_fails_ends_the_answer_and_frees_the_others(tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with system(tmp_path) as router:
            answer, _ = await begin(router)
            scheduler = router.stages["scheduler-0"]
            assert scheduler.router is not None
            error = common_pb2.ErrorDetail(code="request_failed", message="its logits held NaN")
            rejected = router_pb2.Rejected(request_id=submits(router)[1].work.request_id, error=error)
            scheduler.router.send("rejected", rejected)
            await answer.done()
            assert answer.status == 500
            assert answer.error["message"] == "its logits held NaN"
            await router.until(lambda: scheduler.arms().count("abort") == NUM_CHOICES - 1)
            await router.until(lambda: not router.service.gateway.turnstile.num_open)
    assert [line["event"] for line in lines if line["event"].startswith("request.")] == ["request.failed"]


async def test_the_tokenizers_refusal_is_told_once(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer = Answer(router, n=NUM_CHOICES, max_tokens=5)
        router.stages["tokenizer-0"].is_silent = True
        await router.until(lambda: router.stages["tokenizer-0"].got)
        body, _ = router.stages["tokenizer-0"].last("tokenize")
        peer = router.stages["tokenizer-0"].router
        assert peer is not None
        error = common_pb2.ErrorDetail(code="invalid_request", message="prompt too long", param="messages")
        peer.send("tokenize_reply", tokenizer_pb2.TokenizeReply(request_id=body.work.request_id, error=error))
        await answer.done()
        assert (answer.status, answer.error["param"]) == (400, "messages")
        assert not router.stages["scheduler-0"].got
        assert router.service.gateway.turnstile.num_open == 0


async def test_a_killed_scheduler_gets_every_choice_again_with_what_each_had(tmp_path: Path) -> None:
    async with system(tmp_path) as router:
        answer, streams = await begin(router)
        first = submits(router)
        for index, stream_id in enumerate(streams):
            detokenizer(router).deltas(stream_id, 0, "ab"[: index or 1], num=index + 1)
        await router.until(lambda: len(answer.text) == 4)
        router.kill(router.stages["scheduler-0"])
        router.start("scheduler", "scheduler-1")
        await router.until(lambda: len(submits(router, "scheduler-1")) == NUM_CHOICES)
        again = submits(router, "scheduler-1")
        assert [submit.num_output_tokens for submit in again] == [1, 2, 3]
        assert [submit.sampling.seed for submit in again] == [submit.sampling.seed for submit in first]
        for index, stream_id in enumerate(streams):
            detokenizer(router).deltas(stream_id, index + 1, "!", finish=STOP)
        await answer.done()
        assert texts(answer) == ["a!", "a!", "ab!"]


async def test_too_many_choices_for_the_house_are_refused_whole(tmp_path: Path) -> None:
    async with system(tmp_path, max_open_requests=2) as router:
        answer = Answer(router, n=NUM_CHOICES)
        await answer.done()
        assert answer.status == 429
        assert "this one has 3 choices" in answer.error["message"]
        assert router.service.gateway.turnstile.num_open == 0


@pytest.mark.parametrize("method", ["Generate", "Chat"])
async def test_choices_over_grpc(method: str, tmp_path: Path) -> None:
    async with system(tmp_path, grpc_port=0) as router:
        assert router.service.grpc is not None
        async with grpc.aio.insecure_channel(f"127.0.0.1:{router.service.grpc.port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            prompt = {"messages": [{"role": "user", "content": "hi"}]}
            call = (
                stub.Generate(inference_pb2.GenerateRequest(text="hi", num_choices=2))
                if method == "Generate"
                else stub.Chat(inference_pb2.ChatRequest(prompt=prompt, num_choices=2))
            )
            await router.until(lambda: len(submits(router)) == 2)
            for index, submit in enumerate(submits(router)):
                detokenizer(router).deltas(submit.stream_id, 0, f"c{index}")
                detokenizer(router).deltas(submit.stream_id, 1, "!", finish=STOP)
            router.network.settle()
            pieces = [piece async for piece in call]
    found = ["", ""]
    for piece in pieces:
        found[piece.choice] += piece.text if method == "Generate" else piece.content
    assert found == ["c0!", "c1!"]
    assert [piece.choice for piece in pieces if piece.finish_reason == STOP] == [0, 1]
    assert [piece.HasField("usage") for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (pieces[-1].usage.num_prompt_tokens, pieces[-1].usage.num_output_tokens) == (3, 4)
