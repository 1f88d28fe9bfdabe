"""compose.yaml for real, scaled: it comes up in order, answers, spreads work over added instances, survives a kill, stops cleanly.

Needs a Docker engine: `make compose-test`. All published ports are on 127.0.0.1, all names are this run's own.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from headrace.v1 import inference_pb2, inference_pb2_grpc, tokenizer_pb2

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
SCALE = {"tokenizer": 3, "detokenizer": 2, "worker": 2}
PORTS = {"router": 9100, "tokenizer": 9101, "scheduler": 9102, "worker": 9103, "detokenizer": 9104}
READY_WITHIN_S = 180

pytestmark = [pytest.mark.compose, pytest.mark.slow, pytest.mark.timeout(1500)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Deployment:
    """One `docker compose` project of this run's own."""

    def __init__(self) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.project = f"headrace-test-{os.getpid()}"
        self._environment = os.environ | {"HTTP_PORT": str(self.http_port), "GRPC_PORT": str(self.grpc_port), "MODEL": MODEL}

    def compose(self, *arguments: str, timeout_s: float = 120, is_checked: bool = True) -> str:
        command = ["docker", "compose", "--project-name", self.project, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if is_checked and done.returncode != 0:
            pytest.fail(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def metric(self, service: str, container: str, name: str) -> float:
        """The sum of a metric's samples in one container, over its labels."""
        probe = ["docker", "exec", container, "python", "-IS", "/opt/probe.py", str(PORTS[service]), "/metrics"]
        text = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=True).stdout
        samples = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE)
        assert samples, f"{service} has no metric {name}"
        return sum(map(float, samples))

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while (answer := self.get("/ready"))[0] != 200:
            if time.monotonic() > deadline:
                pytest.fail(f"not ready within {READY_WITHIN_S} s: {answer}\n{self.compose('logs', '--tail', '40')}")
            time.sleep(0.5)

    def wait_instances(self) -> dict[str, Any]:
        """Wait until the router knows every instance with its model; return its /health."""
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            stages = json.loads(self.get("/health")[1])["stages"]
            serving = {stage: sum(MODEL in each["models"] for each in instances) for stage, instances in stages.items()}
            if all(serving[stage] == SCALE.get(stage, 1) for stage in serving) and self.num_lanes() == SCALE["worker"]:
                return dict(stages)
            assert time.monotonic() < deadline, f"serving instances: {serving}, lanes: {self.num_lanes()}"
            time.sleep(0.5)

    def num_lanes(self) -> float:
        (scheduler,) = self.containers("scheduler")
        return self.metric("scheduler", scheduler, "headrace_scheduler_lanes")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.http_port}/v1", api_key="none", timeout=120, max_retries=0)

    def chat(self, text: str, *, max_tokens: int) -> str:
        """A greedy answer, streamed; fails unless the stream ends with a finish reason."""
        content, finish_reason = "", None
        with self.client() as client:
            stream = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": text}],
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
            )
            for chunk in stream:
                for choice in chunk.choices:
                    content += choice.delta.content or ""
                    finish_reason = choice.finish_reason or finish_reason
        assert finish_reason in ("stop", "length")
        return content


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    deployment = Deployment()
    scale = [word for service, count in SCALE.items() for word in ("--scale", f"{service}={count}")]
    try:
        deployment.compose("up", "--build", "--detach", *scale, timeout_s=1200)
        deployment.wait_ready()
        yield deployment
    finally:
        deployment.compose("down", "--volumes", "--timeout", "20", timeout_s=120, is_checked=False)


def test_compose_reads_the_files_with_and_without_the_profile() -> None:
    """Nothing is started: the profile's services are there when asked for."""
    plain = Deployment().compose("config", "--services").split()
    with_vectors = Deployment().compose("--profile", "embeddings", "config", "--services").split()
    assert set(with_vectors) - set(plain) == {"embedding-model", "embedding-tokenizer", "embedding-worker"}
    assert set(plain) == {"keys", "model", *PORTS}
    Deployment().compose("-f", "compose.yaml", "-f", "compose.gpu.yaml", "--profile", "embeddings", "config", "--quiet")


def test_openai_client_gets_a_sensible_streamed_answer(deployment: Deployment) -> None:
    assert "Tokyo" in deployment.chat("What is the capital of Japan?", max_tokens=40)


def test_grpc_chat_streams_text_and_ends_with_usage(deployment: Deployment) -> None:
    turn = tokenizer_pb2.ChatMessage(role="user", content="What is the capital of Japan?")
    request = inference_pb2.ChatRequest(model=MODEL, prompt=tokenizer_pb2.ChatPrompt(messages=[turn]))
    request.sampling.temperature = 0
    request.stopping.max_tokens = 40
    with grpc.insecure_channel(f"127.0.0.1:{deployment.grpc_port}") as channel:
        pieces = list(inference_pb2_grpc.InferenceStub(channel).Chat(request, timeout=120))
    assert "Tokyo" in "".join(piece.content for piece in pieces)
    assert pieces[-1].usage.num_output_tokens == sum(len(piece.token_ids) for piece in pieces) > 0


def test_every_added_instance_gets_work(deployment: Deployment) -> None:
    """Goal: scaling is more than containers. Method: each instance's own counters before and after a burst of requests."""
    deployment.wait_instances()
    counters = {
        "tokenizer": "headrace_tokenizer_tokens_total",
        "detokenizer": "headrace_detokenizer_tokens_total",
        "worker": "headrace_worker_steps_total",
    }
    places = [(service, container) for service in counters for container in deployment.containers(service)]
    assert len(places) == sum(SCALE.values())
    before = {place: deployment.metric(*place, counters[place[0]]) for place in places}

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda index: deployment.chat(f"Count from {index} upwards.", max_tokens=24), range(24)))

    assert all(answers)
    idle = [place for place in places if deployment.metric(*place, counters[place[0]]) <= before[place]]
    assert not idle


def test_a_killed_worker_costs_no_request_and_changes_no_answer(deployment: Deployment) -> None:
    deployment.wait_instances()
    prompts = [f"Tell me a story about the number {index}." for index in range(8)]
    alone = [deployment.chat(prompt, max_tokens=60) for prompt in prompts[:2]]
    victim = deployment.containers("worker")[0]
    before = deployment.metric("worker", victim, "headrace_worker_steps_total")

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(deployment.chat, prompt, max_tokens=60) for prompt in prompts]
        deadline = time.monotonic() + 60
        while deployment.metric("worker", victim, "headrace_worker_steps_total") <= before + 3:
            assert time.monotonic() < deadline, "the worker to be killed got no work"
        subprocess.run(["docker", "kill", "--signal", "KILL", victim], capture_output=True, timeout=30, check=True)
        texts = [answer.result(timeout=180) for answer in answers]

    assert all(texts)
    # The first words cannot tie; later ones may differ by the company a row keeps in bfloat16.
    assert [text[:20] for text in texts[:2]] == [text[:20] for text in alone]
    subprocess.run(["docker", "start", victim], capture_output=True, timeout=30, check=True)
    deployment.wait_instances()


def test_what_clients_left_is_there_after_the_router_is_made_anew(deployment: Deployment) -> None:
    with deployment.client() as client:
        kept = client.files.create(file=("note.txt", b"still here"), purpose="user_data")
        deployment.compose("up", "--detach", "--no-deps", "--force-recreate", "router")
        deployment.wait_ready()
        assert client.files.content(kept.id).read() == b"still here"
    deployment.wait_instances()


@pytest.mark.parametrize("service", list(PORTS))
def test_only_the_workers_image_has_torch_and_none_runs_as_root(deployment: Deployment, service: str) -> None:
    container = deployment.containers(service)[0]
    code = "import importlib.util as u, os; print(u.find_spec('torch') is not None, os.getuid() != 0)"
    asked = subprocess.run(
        ["docker", "exec", container, "python", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert asked.stdout.split() == [str(service == "worker"), "True"]


def test_only_the_public_ports_are_published_and_only_on_this_machine(deployment: Deployment) -> None:
    published = set()
    for service in PORTS:
        for container in deployment.containers(service):
            done = subprocess.run(["docker", "port", container], capture_output=True, text=True, timeout=30, check=True)
            published |= {line.split(" -> ")[1] for line in done.stdout.splitlines()}
    assert published == {f"127.0.0.1:{deployment.http_port}", f"127.0.0.1:{deployment.grpc_port}"}


def test_stop_is_clean_in_every_container(deployment: Deployment) -> None:
    containers = {container: service for service in PORTS for container in deployment.containers(service)}
    deployment.compose("stop", timeout_s=120)
    status = {}
    for container, service in containers.items():
        asked = subprocess.run(
            ["docker", "inspect", "--format", "{{.State.ExitCode}}", container],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        status[f"{service} {container[:12]}"] = int(asked.stdout)
    assert set(status.values()) == {0}, status
