"""Measuring servers that are up: blocks against a fake OpenAI server, servers as processes, the whole run, the command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp.test_utils import TestServer
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from bench.free_ports import free_ports
from bench.peers import compare, proc, servers
from bench.peers.__main__ import main
from bench.peers.block import Block, Target, Turn, play, play_scripts
from bench.peers.running import RunningServer, ServerError, running
from bench.peers.servers import ServerSpec
from bench.peers.workloads import Script
from bench.serve.client import LoadClient, open_session
from bench.serve.fake_server import FakeOpenAI
from bench.serve.openai_stream import Endpoint, Sampling
from headrace.supervision.process_table import descendants, read_table
from tests.patience import WAIT_S

ROOT = Path(__file__).parents[3]
FAKE_SERVER = """
import asyncio, sys
from aiohttp import web
from bench.serve.fake_server import FakeOpenAI

application = FakeOpenAI(num_template_tokens=0).application()
async def ready(_): return web.Response(text="ok")
application.router.add_get("/health", ready)
web.run_app(application, host="127.0.0.1", port=int(sys.argv[1]), access_log=None)
"""


@pytest.fixture
def fake() -> FakeOpenAI:
    return FakeOpenAI(num_template_tokens=0)


@pytest.fixture
async def base_url(fake: FakeOpenAI) -> AsyncIterator[str]:
    async with TestServer(fake.application(), port=0) as server:
        yield str(server.make_url("")).rstrip("/")


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer with a token a word."""
    path = tmp_path / "models" / "hf-bf16" / "tokenizer.json"
    path.parent.mkdir(parents=True)
    tokenizer = Tokenizer(WordLevel({"word": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path))
    return path


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process to stand for a server's, where only its figures are read."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        yield process


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which something else uses a core, by the clock: a real one need not get that core while others want it too."""
    monkeypatch.setattr(proc, "machine_cpu_s", lambda: time.process_time() + time.monotonic())


async def played(block: Block) -> list[dict[str, Any]]:
    return [result async for result in play(block)]


def block(base_url: str, model: str, pid: int, tokenizer_file: Path, workload: str = "W1", limit_s: float = WAIT_S) -> Block:
    names = {"headrace": model, "vllm": model}
    targets = tuple(
        Target(name, base_url, names[name], pid, sends_ignore_eos=True, sends_done=True, work_share=0.5) for name in names
    )
    return Block(
        workload=workload, round=0, seed="s", scale=0.5, limit_s=limit_s, num_retries=0, tokenizer_file=str(tokenizer_file),
        targets=targets, turns=(Turn("headrace", "vllm"), Turn("vllm", "vllm")), calm_wait_s=0.0,
    )  # fmt: skip


async def test_a_block_measures_each_turn_with_the_same_prompts(
    base_url: str, fake: FakeOpenAI, sleeper: subprocess.Popen[bytes], tokenizer_file: Path
) -> None:
    results = await played(block(base_url, "ok", sleeper.pid, tokenizer_file))
    assert [(result["server"], result["summary"]["num_ok"]) for result in results] == [("headrace", 2), ("vllm", 2)]
    assert all(result["memory"]["pss_mib"] > 0 for result in results)
    asked = [(body["prompt"], body["max_tokens"], body["ignore_eos"]) for body in fake.bodies]
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :]
    assert {len(prompt.split()) for prompt, _, _ in asked} == {128}
    assert {max_tokens for _, max_tokens, _ in asked} == {8, 128}


async def test_no_two_blocks_have_a_prompt_in_common(
    base_url: str, fake: FakeOpenAI, sleeper: subprocess.Popen[bytes], tokenizer_file: Path
) -> None:
    """Or else a prefix cache would help the later one."""
    first = block(base_url, "ok", sleeper.pid, tokenizer_file)
    for other in (first, replace(first, workload="W4"), replace(first, round=1)):
        await played(replace(other, turns=(Turn("vllm", "vllm"), Turn("vllm", "llamacpp"))))
    beginnings = [" ".join(body["prompt"].split()[:16]) for body in fake.bodies]
    assert len(set(beginnings)) == len(beginnings)


async def test_a_server_that_fails_or_hangs_is_an_error_and_the_next_is_measured(
    base_url: str, sleeper: subprocess.Popen[bytes], tokenizer_file: Path
) -> None:
    failing, _ = await played(block(base_url, "busy", sleeper.pid, tokenizer_file))
    assert failing["summary"]["num_ok"] == 0
    assert any("failed: 2 of 2 requests: http_429: queue is full" in remark for remark in failing["remarks"])
    results = await played(block(base_url, "mute", sleeper.pid, tokenizer_file, limit_s=0.5))
    assert [result["error"] for result in results] == ["not done within 0 s"] * 2


async def test_a_block_that_is_cut_off_has_written_what_was_done(
    base_url: str, sleeper: subprocess.Popen[bytes], tokenizer_file: Path, tmp_path: Path
) -> None:
    whole = block(base_url, "ok", sleeper.pid, tokenizer_file)
    hanging = replace(whole, targets=(whole.targets[0], replace(whole.targets[1], model="mute")))
    result_path = tmp_path / "result.json"
    (tmp_path / "block.json").write_bytes(hanging.as_json())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.peers", "block", str(tmp_path / "block.json"), str(result_path), cwd=ROOT
    )
    try:
        async with asyncio.timeout(WAIT_S):
            while not result_path.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        process.kill()
        await process.wait()
    assert [result["server"] for result in orjson.loads(result_path.read_bytes())] == ["headrace"]


@pytest.mark.usefixtures("busy")
async def test_a_measurement_waits_for_a_busy_machine_no_longer_than_it_may_and_says_so(
    base_url: str, sleeper: subprocess.Popen[bytes], tokenizer_file: Path
) -> None:
    result, _ = await played(replace(block(base_url, "ok", sleeper.pid, tokenizer_file), calm_wait_s=1.0, num_retries=1))
    assert result["num_attempts"] == 2
    assert result["took_s"] >= 1.0
    assert any(remark.startswith("disturbed: something else on the machine used") for remark in result["remarks"])


async def test_answers_become_part_of_the_next_prompt(base_url: str, fake: FakeOpenAI) -> None:
    async with open_session(api_key=None, timeout_s=WAIT_S, new_connections=True) as session:
        client = LoadClient(session, base_url=base_url, endpoint=Endpoint.COMPLETIONS, sampling=Sampling(model="ok"))
        records = await play_scripts(client, [Script(0, ("one", " two", " three"), 2)], 1)
    assert [body["prompt"] for body in fake.bodies] == ["one", "one word word two", "one word word two word word three"]
    assert [record.index for record in records] == [0, 1, 2]


async def test_a_conversation_ends_with_its_first_failure(base_url: str, fake: FakeOpenAI) -> None:
    async with open_session(api_key=None, timeout_s=WAIT_S, new_connections=True) as session:
        client = LoadClient(session, base_url=base_url, endpoint=Endpoint.COMPLETIONS, sampling=Sampling(model="half"))
        records = await play_scripts(client, [Script(0, ("one", " two", " three"), 2)], 1)
    assert [record.is_ok for record in records] == [True, False]


def fake_server(name: str, *, code: str = FAKE_SERVER, limit_s: float = WAIT_S, needs_bytes: int = 1 << 20) -> ServerSpec:
    (port,) = free_ports(1)
    return ServerSpec(
        name=name, about="a fake", argv=[sys.executable, "-c", code, str(port)], env={"PYTHONPATH": str(ROOT)}, port=port,
        ready_path="/health", model="ok", start_limit_s=limit_s, needs_bytes=needs_bytes,
    )  # fmt: skip


def quiet(_: str) -> None:
    """Progress that nobody reads."""


def test_servers_are_up_together_and_all_gone_afterwards(tmp_path: Path) -> None:
    with running([fake_server("one"), fake_server("two")], logs=tmp_path, say=quiet) as started:
        pids = {server.pid for server, _ in started.values()}
        assert len(pids) == 2 and pids <= read_table().keys()
        assert all(ready_s > 0 for _, ready_s in started.values())
    assert not pids & read_table().keys()


def test_a_stop_ends_what_a_server_started_and_left(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(50)'], start_new_session=True)\n"
    )
    server = RunningServer(fake_server("one", code=code + FAKE_SERVER), tmp_path / "log")
    server.wait_ready()
    children = descendants(read_table(), {server.pid})
    assert children
    server.stop()
    table = read_table()
    assert not any(table[pid].is_alive for pid in children & table.keys())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (fake_server("one", code="print('no model here'); raise SystemExit(3)"), r"(?s)one ended with status 3; .*no model here"),
        (fake_server("one", code="import time; time.sleep(60)", limit_s=0.5), "was not ready within 0 s"),
        (fake_server("one", needs_bytes=1 << 60), r"one needs \d+ GiB of memory, .* leave a peer out"),
    ],
)
def test_a_server_that_cannot_come_up_is_told_with_the_reason(tmp_path: Path, spec: ServerSpec, message: str) -> None:
    with pytest.raises(ServerError, match=message), running([spec], logs=tmp_path, say=quiet):
        pytest.fail("it came up")


@pytest.fixture
def fake_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake servers in the place of ours and of llama.cpp."""
    monkeypatch.setattr(servers, "headrace", lambda *_, **__: fake_server("headrace"))
    monkeypatch.setitem(compare.PEER_SERVERS, "llamacpp", lambda *_: fake_server("llamacpp"))


@pytest.mark.usefixtures("fake_peers", "tokenizer_file")
def test_the_command_measures_writes_and_shows(tmp_path: Path) -> None:
    out = tmp_path / "results" / "peers.json"
    arguments = ["run", "--root", str(tmp_path), "--workloads", "W1,W4", "--peers", "llamacpp", "--rounds", "1", "--scale", "0.1"]
    done = CliRunner().invoke(
        main, [*arguments, "--retries", "0", "--calm-wait-s", "0", "--out", str(out), "--measure-under", f"env MARK={tmp_path}"]
    )
    assert done.exit_code == 0, done.output
    result = orjson.loads(out.read_bytes())
    assert result["schema"] == "headrace.bench.peers/1"
    assert [(each["workload"], each["server"]) for each in result["measurements"]] == [
        ("W1", "headrace"), ("W1", "llamacpp"), ("W4", "headrace"), ("W4", "llamacpp"),
    ]  # fmt: skip
    assert {ratio["metric"] for ratio in result["ratios"]} >= {"out tok/s", "TTFT p50 ms"}
    shown = CliRunner().invoke(main, ["table", str(out)])
    assert "**W4**: 1 client, 1,500 in, 8 out" in shown.output and shown.output in done.output


@pytest.mark.usefixtures("fake_peers", "tokenizer_file")
def test_a_measuring_process_that_fails_is_an_error_of_its_pair(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    arguments = ["run", "--root", str(tmp_path), "--workloads", "W1", "--peers", "llamacpp", "--rounds", "1", "--out", str(out)]
    done = CliRunner().invoke(main, [*arguments, "--measure-under", "false"])
    assert done.exit_code == 0, done.output
    measurements = json.loads(out.read_text())["measurements"]
    assert [each["server"] for each in measurements] == ["headrace", "llamacpp"]
    assert all("the measuring process ended with status 1" in each["error"] for each in measurements)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--workloads", "W1,W9"], "W9: there are W1, W2"),
        (["run", "--peers", "ollama"], "ollama: there are vllm"),
        (["setup", "--peers", "vllm,vllm"], "names one twice"),
        (["run", "--rounds", "0"], "0 is not in the range"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and message in done.output
