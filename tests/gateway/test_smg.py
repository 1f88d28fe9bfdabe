"""The public gateway `smg` in front of two engines, one behind each protocol: registration, chat, aborts, caches, a death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.free_ports import free_ports
from tests.e2e.process_tree import wait_until
from tests.e2e.server import Server
from tests.patience import GROWING_S, WAIT_S, promised

_CLIENT = """
import sys, urllib.request
url, body = sys.argv[1:]
answer = urllib.request.urlopen(urllib.request.Request(url, body.encode(), {"content-type": "application/json"}))
print(answer.read(1), flush=True)
answer.read()
"""
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of Japan?"
# Of some pages, and of a story that no other test asks for.
STORY = (
    "The mill stood where the river bent, and every morning the miller opened the gate of the headrace before the sun rose. " * 12
)


def post(url: str, body: dict[str, Any], timeout_s: float = WAIT_S) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=timeout_s)


def answer_of(url: str, body: dict[str, Any]) -> Any:
    with post(url, body) as response:
        return json.load(response)


def events_of(response: Any) -> Iterator[Any]:
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def chat(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24, **fields}


class Gateway:
    """The gateway's process."""

    def __init__(self, engines: list[int], log: Path) -> None:
        port, metrics_port = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        options = {
            "host": "127.0.0.1",
            "port": port,
            "prometheus-port": metrics_port,
            "prometheus-host": "127.0.0.1",
            "worker-startup-check-interval": 1,
            "health-check-interval-secs": 1,
            "health-failure-threshold": 2,
            "health-success-threshold": 1,
            "shutdown-grace-period-secs": 1,
            # A loaded test machine is slow, not wedged.
            "worker-wedge-secs": 60,
            "log-level": "warn",
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        urls = [f"grpc://127.0.0.1:{engine}" for engine in engines]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "smg", "launch", *flags, "--worker-urls", *urls], stdout=output, stderr=output
            )
        self._log = log

    def num_healthy(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/workers", timeout=WAIT_S) as response:
                workers = json.load(response)["workers"]
        except OSError:
            assert self.process.poll() is None, self._log.read_text(errors="replace")[-3000:]
            return 0
        return sum(worker["is_healthy"] for worker in workers)

    def wait_healthy(self, count: int) -> None:
        what = f"{count} healthy engines; the gateway says:\n{self._log.read_text(errors='replace')[-2000:]}"
        wait_until(lambda: self.num_healthy() == count, WAIT_S, what)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(WAIT_S)


@pytest.fixture(scope="module")
def ports() -> list[int]:
    return free_ports(2)


@pytest.fixture(scope="module")
def engines(default_model_directory: Path, model_store: Path, ports: list[int]) -> Iterator[list[Server]]:
    """One engine with each protocol."""
    names = ("router_sglang_grpc_port", "router_vllm_grpc_port")
    with Server(model_store, **{names[0]: str(ports[0])}) as first, Server(model_store, **{names[1]: str(ports[1])}) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def gateway(engines: list[Server], ports: list[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    running = Gateway(ports, tmp_path_factory.mktemp("smg") / "smg.log")
    try:
        running.wait_healthy(2)
        # Tokenizers are loaded after the engines are there.
        wait_until(lambda: _is_served(running), WAIT_S, "the gateway serves the model")
        yield running
    finally:
        running.stop()


def _is_served(gateway: Gateway) -> bool:
    try:
        answer_of(f"{gateway.url}/v1/chat/completions", chat("hello", max_tokens=1))
    except OSError:
        return False
    return True


def num_generated(engine: Server) -> float:
    """Generate calls that an engine has ended."""
    return engine.metric("headrace_requests_total", "/Generate")


def open_requests(engine: Server) -> float:
    return engine.metric("headrace_router_open_requests")


def test_a_chat_through_the_gateway_is_the_chat_without_it(gateway: Gateway, engines: list[Server]) -> None:
    direct = answer_of(f"{engines[0].http}/v1/chat/completions", chat(QUESTION))
    before = [num_generated(engine) for engine in engines]
    asked = 0
    # New prompts go to either engine; both must be seen to answer.
    while any(num_generated(engine) == count for engine, count in zip(engines, before, strict=True)) and asked < 40:
        whole = answer_of(f"{gateway.url}/v1/chat/completions", chat(f"{asked} {QUESTION}", max_tokens=4))
        assert whole["usage"]["completion_tokens"] <= 4
        asked += 1
    assert all(num_generated(engine) > count for engine, count in zip(engines, before, strict=True)), "both engines serve"
    whole = answer_of(f"{gateway.url}/v1/chat/completions", chat(QUESTION))
    assert whole["choices"][0]["message"]["content"] == direct["choices"][0]["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == direct["choices"][0]["finish_reason"]
    assert whole["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"]
    with post(f"{gateway.url}/v1/chat/completions", chat(QUESTION, stream=True)) as response:
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events_of(response) if event["choices"])
    assert text == direct["choices"][0]["message"]["content"]


def test_stop_strings_and_choices(gateway: Gateway) -> None:
    for _ in range(4):
        stopped = answer_of(f"{gateway.url}/v1/chat/completions", chat(QUESTION, stop=["Tokyo"]))["choices"][0]
        assert stopped["finish_reason"] == "stop"
        assert "Tokyo" not in stopped["message"]["content"]
    several = answer_of(f"{gateway.url}/v1/chat/completions", chat(QUESTION, n=3, temperature=1.0, max_tokens=5))
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]


def num_tokens(engines: list[Server]) -> float:
    """Output tokens of all requests that have ended."""
    return sum(engine.metric("headrace_output_tokens_total") for engine in engines)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_abort_frees_the_slot_within_a_second(gateway: Gateway, engines: list[Server], is_streamed: bool) -> None:
    body = chat("Tell a very long story.", max_tokens=2000, stream=is_streamed, ignore_eos=True)
    before = num_tokens(engines)
    asking = [sys.executable, "-c", _CLIENT, f"{gateway.url}/v1/chat/completions", json.dumps(body)]
    with subprocess.Popen(asking, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        try:
            wait_until(lambda: sum(map(open_requests, engines)) >= 1, WAIT_S, "the request is open")
            if is_streamed:
                assert client.stdout.readline(), "the answer has begun"
        finally:
            client.kill()
    took_s = wait_until(lambda: sum(map(open_requests, engines)) == 0, promised(1.0 + _POLL_SLACK_S), "the slot is free")
    print(f"the slot was free after {took_s:.2f} s")
    assert num_tokens(engines) - before < 2000, "it was cut short"


_POLL_SLACK_S = 0.5
"""What asking two engines for their metrics may take."""


def test_traffic_follows_what_an_engine_has_cached(gateway: Gateway, engines: list[Server]) -> None:
    for engine in engines:
        # What the gateway knows cannot be asked. Where it heard later than this, another story is told and waited for longer.
        for pause_s in GROWING_S:
            # The engine learns the prompt without the gateway, which hears of it by events alone.
            story = f"Version {pause_s} of {engine.http}. {STORY}"
            answer_of(f"{engine.http}/v1/chat/completions", chat(story, max_tokens=1))
            time.sleep(pause_s)
            before = num_generated(engine)
            for _ in range(4):
                answer_of(f"{gateway.url}/v1/chat/completions", chat(story, max_tokens=1))
            if num_generated(engine) - before == 4:
                break
        assert num_generated(engine) - before == 4


def test_an_engine_that_is_killed_comes_back_without_the_gateway_s_restart(gateway: Gateway, engines: list[Server]) -> None:
    for victim in engines:
        os.kill(victim.process.pid, signal.SIGKILL)
        victim.process.wait(WAIT_S)
        gateway.wait_healthy(1)
        # The other one serves meanwhile.
        assert answer_of(f"{gateway.url}/v1/chat/completions", chat(QUESTION, max_tokens=4))["choices"]
        wait_until(lambda one=victim: not one.tree(), WAIT_S, "nothing is left of the engine")  # type: ignore[misc]
        victim.kill_all()
        victim.http = ""
        victim.start()
        gateway.wait_healthy(2)
        before = num_generated(victim)
        _ask_until(gateway, lambda one=victim, count=before: num_generated(one) > count)  # type: ignore[misc]


def _ask_until(gateway: Gateway, condition: Callable[[], bool]) -> None:
    for number in range(40):
        answer_of(f"{gateway.url}/v1/chat/completions", chat(f"{number} {QUESTION}", max_tokens=2))
        if condition():
            return
    raise AssertionError("the engine that came back got none of 40 requests")
