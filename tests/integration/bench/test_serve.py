"""The load client against a fake OpenAI server on an ephemeral port: counts, failures, loops, and the whole command."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from bench.serve.client import LoadClient, open_session
from bench.serve.fake_server import FakeOpenAI
from bench.serve.openai_stream import Endpoint, Sampling
from bench.serve.records import RequestRecord, RequestSpec
from bench.serve.report import as_json
from bench.serve.run import Plan, ProbeError, execute
from bench.serve.summary import Slo
from tests.patience import GROWING_S, WAIT_S


@pytest.fixture
def fake() -> FakeOpenAI:
    return FakeOpenAI()


@pytest.fixture
async def base_url(fake: FakeOpenAI) -> AsyncIterator[str]:
    async with TestServer(fake.application(), port=0) as server:
        yield str(server.make_url(""))


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session(api_key="sk-test", timeout_s=WAIT_S, new_connections=False) as opened:
        yield opened


def plan(base_url: str, model: str, **changes: object) -> Plan:
    values: dict[str, object] = {
        "base_url": base_url, "endpoint": Endpoint.COMPLETIONS, "sampling": Sampling(model=model), "concurrencies": (2,),
        "rates_per_s": (), "num_requests": 6, "num_warmup_requests": 1, "num_prompt_tokens": 20, "num_shared_prefix_tokens": 0,
        "num_output_tokens": 4, "dataset": (), "seed": 1, "slo": Slo(), "timeout_s": WAIT_S,
    }  # fmt: skip
    return Plan(**(values | changes))  # type: ignore[arg-type]


async def send_one(
    session: aiohttp.ClientSession, base_url: str, model: str, endpoint: Endpoint = Endpoint.COMPLETIONS
) -> RequestRecord:
    client = LoadClient(session, base_url=base_url, endpoint=endpoint, sampling=Sampling(model=model))
    return await client.send(RequestSpec(index=0, prompt="three little words", num_output_tokens=5))


@pytest.mark.parametrize(("needs_done", "error"), [(True, "truncated"), (False, None)])
async def test_a_stream_without_done_is_whole_only_where_none_is_expected(
    session: aiohttp.ClientSession, needs_done: bool, error: str | None
) -> None:
    sampling = Sampling(model="ok")
    async with TestServer(FakeOpenAI(sends_done=False).application(), port=0) as server:
        base_url = str(server.make_url(""))
        client = LoadClient(session, base_url=base_url, endpoint=Endpoint.COMPLETIONS, sampling=sampling, needs_done=needs_done)
        record = await client.send(RequestSpec(index=0, prompt="one", num_output_tokens=3))
    assert record.error_kind == error
    assert record.text == " word word word"


def quiet(_: str) -> None:
    """Progress that nobody reads."""


@pytest.mark.parametrize("endpoint", list(Endpoint))
async def test_a_stream_is_counted_by_chunk_and_by_usage(session: aiohttp.ClientSession, base_url: str, endpoint: Endpoint) -> None:
    record = await send_one(session, base_url, "ok", endpoint)
    assert record.is_ok
    assert len(record.chunk_times_ns) == record.num_output_tokens == 5
    assert record.usage_prompt_tokens == 4
    assert record.finish_reason == "length"
    assert record.started_ns < record.chunk_times_ns[0] <= record.chunk_times_ns[-1] <= record.ended_ns


async def test_a_base_url_with_v1_is_the_same_server_and_the_key_is_sent(
    session: aiohttp.ClientSession, base_url: str, fake: FakeOpenAI
) -> None:
    assert (await send_one(session, base_url.rstrip("/") + "/v1/", "ok")).is_ok
    assert fake.authorizations == ["Bearer sk-test"]


@pytest.mark.parametrize(
    ("model", "kind", "says"),
    [
        ("busy", "http_429", "queue is full"),
        ("page", "http_500", "<html>"),
        ("errors", "stream_error", "worker lost"),
        ("garbage", "bad_chunk", "not json"),
        ("truncated", "truncated", "[DONE]"),
        ("cut", "disconnected", ""),
    ],
)
async def test_each_way_to_fail_has_its_own_kind(
    session: aiohttp.ClientSession, base_url: str, model: str, kind: str, says: str
) -> None:
    record = await send_one(session, base_url, model)
    assert record.error_kind == kind
    assert says in record.error_message
    assert record.ended_ns > record.started_ns


async def test_a_server_that_falls_silent_is_a_timeout(base_url: str) -> None:
    for timeout_s in GROWING_S:
        async with open_session(api_key=None, timeout_s=timeout_s, new_connections=False) as session:
            record = await send_one(session, base_url, "mute")
        assert record.error_kind == "timeout"
        if record.chunk_times_ns:
            break
    assert len(record.chunk_times_ns) == 1


async def test_nobody_listening_is_a_connect_error(session: aiohttp.ClientSession, unused_tcp_port: int) -> None:
    assert (await send_one(session, f"http://127.0.0.1:{unused_tcp_port}", "ok")).error_kind == "connect"


async def test_the_closed_loop_never_opens_more_than_its_concurrency(base_url: str, fake: FakeOpenAI) -> None:
    outcome = await execute(plan(base_url, "ok", concurrencies=(1, 3), num_requests=9, num_warmup_requests=0), on_progress=quiet)
    assert [level.summary.num_ok for level in outcome.levels] == [9, 9]
    assert [record.index for record in outcome.levels[1].records] == list(range(9))
    assert 2 <= fake.num_open_max <= 3


async def test_the_open_loop_sends_every_request_without_waiting_for_answers(base_url: str, fake: FakeOpenAI) -> None:
    # A mute server ends no request, so only a loop that does not wait can have them all open at once.
    for timeout_s in GROWING_S:
        open_plan = plan(
            base_url, "mute", concurrencies=(), rates_per_s=(500.0,), num_warmup_requests=0, timeout_s=timeout_s,
            dataset=(RequestSpec(index=0, prompt="x", num_output_tokens=4),),
        )  # fmt: skip
        outcome = await execute(open_plan, on_progress=quiet)
        if fake.num_open_max == 6:
            break
    assert fake.num_open_max == 6
    assert outcome.levels[0].summary.errors == {"timeout": 6}
    assert outcome.levels[0].summary.late_ms is not None


async def test_random_prompts_are_fitted_to_the_servers_own_count_and_never_repeat(base_url: str, fake: FakeOpenAI) -> None:
    outcome = await execute(plan(base_url, "ok", concurrencies=(1, 2)), on_progress=quiet)
    assert outcome.prompt_fit is not None
    assert (outcome.prompt_fit.num_words, outcome.prompt_fit.num_tokens) == (19, 20)
    for level in outcome.levels:
        assert {record.usage_prompt_tokens for record in level.records} == {20}
    texts = [body["prompt"] for body in fake.bodies]
    assert len(set(texts)) == len(texts)


async def test_a_prompt_shorter_than_the_template_is_reported_not_hidden() -> None:
    async with TestServer(FakeOpenAI(num_template_tokens=30).application(), port=0) as server:
        short = plan(str(server.make_url("")), "ok", endpoint=Endpoint.CHAT)
        result = as_json(short, await execute(short, on_progress=quiet), provenance={})
    assert any("31 tokens (the chat template's own tokens included)" in remark for remark in result["remarks"])
    assert any("could not be met" in remark for remark in result["remarks"])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no-usage", "counted by streamed chunks"),
        ("pairs", "24 tokens came in 12 chunks"),
        ("stops", "6 requests ended by themselves"),
        ("cached", "prefix cache"),
    ],
)
async def test_what_could_mislead_is_said_beside_the_figures(base_url: str, model: str, says: str) -> None:
    done = plan(base_url, model)
    outcome = await execute(done, on_progress=quiet)
    assert any(says in remark for remark in as_json(done, outcome, provenance={})["remarks"])


async def test_a_refused_probe_stops_the_run(base_url: str) -> None:
    with pytest.raises(ProbeError, match="queue is full"):
        await execute(plan(base_url, "busy"), on_progress=quiet)


async def run_command(base_url: str, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.serve", "--base-url", base_url, "--num-requests", "4", "--output-tokens", "3", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_command_prints_a_table_and_writes_the_result(base_url: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.json"
    status, output = await run_command(
        base_url, "--model", "ok", "--concurrency", "1,2", "--json", str(path), "--api-key", "sk-hidden", "--slo-ttft-ms", "60000"
    )
    assert status == 0, output
    assert "concurrency 2" in output
    text = path.read_text()
    assert "sk-hidden" not in text
    result = json.loads(text)
    assert result["schema"] == "headrace.bench.serve/1"
    assert result["provenance"]["num_cores"] >= 1
    assert [level["name"] for level in result["levels"]] == ["concurrency 1", "concurrency 2"]
    level = result["levels"][0]
    assert level["summary"]["num_output_tokens"] == 12
    assert level["summary"]["goodput_requests_per_s"] == level["summary"]["requests_per_s"]
    assert [len(request["itl_ms"]) for request in level["requests"]] == [2, 2, 2, 2]


async def test_a_failed_request_fails_the_command_unless_allowed(base_url: str, tmp_path: Path) -> None:
    dataset = tmp_path / "lines.jsonl"
    dataset.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    arguments = ("--model", "half", "--warmup", "0", "--dataset", str(dataset))
    # One after the other: which requests fail is counted over all that the server gets.
    strict, output = await run_command(base_url, *arguments)
    lenient, _ = await run_command(base_url, *arguments, "--allow-errors")
    hopeless, _ = await run_command(base_url, "--model", "busy", "--warmup", "0", "--dataset", str(dataset), "--allow-errors")
    assert (strict, lenient, hopeless) == (1, 0, 1)
    assert "http_429: queue is full" in output


async def test_an_endpoint_that_is_not_there_is_one_clear_line(unused_tcp_port: int) -> None:
    status, output = await run_command(f"http://127.0.0.1:{unused_tcp_port}", "--model", "ok")
    assert status == 1
    assert output.startswith("Error: nothing measured at http://127.0.0.1:")
    assert "Traceback" not in output
