"""The HTTP server around OpenVINO's pipeline, with a fake pipeline in the place of the real one, which is not installed here."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from bench.peers.block import play_in_process, play_scripts
from bench.peers.workloads import Script
from bench.serve.client import LoadClient, open_session
from bench.serve.openai_stream import Endpoint, Sampling
from tests.patience import WAIT_S

WORD = 0


class FakeHandle:
    """A request of the pipeline: ends after `max_new_tokens`, or when cancelled."""

    def __init__(self, max_new_tokens: int) -> None:
        self.num_left = max_new_tokens
        self.unread: list[int] = []
        self.cancelled = asyncio.Event()

    def can_read(self) -> bool:
        return bool(self.unread)

    def read(self) -> dict[int, Any]:
        tokens, self.unread = self.unread, []
        return {0: SimpleNamespace(generated_ids=tokens)}

    def cancel(self) -> None:
        self.cancelled.set()

    def get_status(self) -> SimpleNamespace:
        is_running = self.num_left > 0 and not self.cancelled.is_set()
        return SimpleNamespace(name="RUNNING" if is_running else "FINISHED")


class FakePipeline:
    """Makes one token a step for each request."""

    made: FakePipeline

    def __init__(self, model: str, scheduler: Any, device: str, properties: dict[str, Any]) -> None:
        FakePipeline.made = self
        self.properties = properties
        self.handles: list[FakeHandle] = []
        self.num_steps = 0
        self.num_running_max = 0
        self.num_awaited = 0

    def add_request(self, number: int, ids: Any, config: Any) -> FakeHandle:
        handle = FakeHandle(config.max_new_tokens)
        self.handles.append(handle)
        return handle

    def step(self) -> None:
        self.num_steps += 1
        if len(self.handles) < self.num_awaited:
            # Whoever is to be batched has not come yet.
            return
        running = [handle for handle in self.handles if handle.get_status().name == "RUNNING"]
        self.num_running_max = max(self.num_running_max, len(running))
        for handle in running:
            handle.unread.append(WORD)
            handle.num_left -= 1


@pytest.fixture
def server_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    genai, openvino = ModuleType("openvino_genai"), ModuleType("openvino")
    genai.__dict__.update(
        SchedulerConfig=SimpleNamespace, GenerationConfig=SimpleNamespace, ContinuousBatchingPipeline=FakePipeline
    )
    openvino.__dict__.update(Tensor=list)
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.delitem(sys.modules, "bench.peers.openvino_server", raising=False)
    return importlib.import_module("bench.peers.openvino_server")


@pytest.fixture
async def base_url(server_module: ModuleType) -> AsyncIterator[str]:
    tokenizer = Tokenizer(WordLevel({"word": WORD, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    engine = server_module.Engine(Path("model"), threads=2, cache_gib=1)
    async with TestServer(server_module.Server(engine, tokenizer).application(), port=0) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_requests_stream_a_chunk_a_token_and_are_batched(base_url: str) -> None:
    FakePipeline.made.num_awaited = 3
    async with open_session(api_key=None, timeout_s=WAIT_S, new_connections=True) as session:
        client = LoadClient(
            session, base_url=base_url, endpoint=Endpoint.COMPLETIONS, sampling=Sampling(model="m", ignore_eos=True)
        )
        records = await play_scripts(client, [Script(index, ("two words",), 40) for index in range(3)], 3)
    assert [(record.num_output_tokens, len(record.chunk_times_ns), record.finish_reason) for record in records] == [
        (40, 40, "length")
    ] * 3
    assert [record.usage_prompt_tokens for record in records] == [2] * 3
    assert FakePipeline.made.num_running_max == 3
    assert FakePipeline.made.properties == {"INFERENCE_NUM_THREADS": 2}


async def test_an_idle_server_does_not_step(base_url: str) -> None:
    await asyncio.sleep(0.1)
    assert FakePipeline.made.num_steps == 0


async def test_a_client_that_leaves_has_its_request_cancelled(base_url: str) -> None:
    body = {"prompt": "word", "max_tokens": 1_000_000, "ignore_eos": True}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)) as session:
        async with session.post(base_url + "/v1/completions", json=body) as response:
            await response.content.readline()
        (handle,) = FakePipeline.made.handles
        await asyncio.wait_for(handle.cancelled.wait(), timeout=WAIT_S)


async def test_in_process_runs_give_a_time_for_each_token(base_url: str) -> None:
    FakePipeline.made.num_awaited = 2
    async with open_session(api_key=None, timeout_s=WAIT_S, new_connections=True) as session:
        records = await play_in_process(session, base_url, [Script(index, ("two words",), 5) for index in range(4)], 2)
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert all(record.is_ok and record.num_output_tokens == len(record.chunk_times_ns) == 5 for record in records)
    assert all(record.started_ns < record.chunk_times_ns[0] <= record.ended_ns for record in records)
    assert FakePipeline.made.num_running_max == 2
