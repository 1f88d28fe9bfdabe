"""A request's output is the same whether the scheduler runs ahead of the worker or not, and ahead the worker hardly waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.free_ports import free_ports
from bench.serve.worker_gap import parse_worker_times
from tests.e2e.server import Server, get
from tests.patience import IS_MACHINE_QUIET, WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
ASKED: list[dict[str, Any]] = [
    {"prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 40},
    {"prompt": "Once upon a time", "temperature": 0.9, "seed": 7, "max_tokens": 40},
    {"prompt": "Q: What is the capital of France?\nA:", "temperature": 0, "stop": ["\n"], "max_tokens": 40},
    {"prompt": "The", "temperature": 1.2, "seed": 3, "top_p": 0.9, "max_tokens": 1},
]
NUM_CONCURRENT = 16


async def answers(server: Server) -> list[tuple[str, str]]:
    """Text and finish reason of each request of ASKED, one after another: rows of a batch may change each other's last bits."""
    async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        choices = [(await client.completions.create(model=MODEL, **asked)).choices[0] for asked in ASKED]
    return [(choice.text, str(choice.finish_reason)) for choice in choices]


async def load(server: Server) -> None:
    """Sixteen answers at once."""
    async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        requests = [
            client.completions.create(model=MODEL, prompt=f"{index} is", max_tokens=60, extra_body={"ignore_eos": True})
            for index in range(NUM_CONCURRENT)
        ]
        finished = await asyncio.gather(*requests)
    for answer in finished:
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 60


def test_running_ahead_changes_no_output_and_fills_the_gaps(default_model_directory: Path, model_store: Path) -> None:
    found = {}
    idle_share = {}
    for run_ahead in ("true", "false"):
        (port,) = free_ports(1)
        with Server(model_store, scheduler_run_ahead=run_ahead, telemetry_worker_metrics_port=str(port)) as server:
            server.wait_standby()
            found[run_ahead] = asyncio.run(answers(server))
            before = parse_worker_times(get(f"http://127.0.0.1:{port}/metrics"))
            asyncio.run(load(server))
            idle_share[run_ahead] = parse_worker_times(get(f"http://127.0.0.1:{port}/metrics")).since(before).idle_share
    assert found["true"] == found["false"]
    assert any(reason == "stop" for _, reason in found["true"])
    print(f"\nidle between steps: {idle_share['true']:.2%} ahead, {idle_share['false']:.2%} not")
    if IS_MACHINE_QUIET:
        assert idle_share["true"] < idle_share["false"]
