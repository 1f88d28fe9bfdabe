"""One block of a comparison: a workload played on ours, a peer, ours, the next peer ..., in a process of its own.

    python -m bench.peers block BLOCK.json RESULT.json

Servers whose turn it is not stay up and idle; what they use meanwhile, and what anything else on the machine uses, is measured too.
A measurement that was disturbed is made again. `bench.peers run` starts one such process for each workload and round.
Results are written after every turn, so a block that is cut off loses what was under way and no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from tokenizers import Tokenizer

from bench.peers import proc
from bench.peers.figures import OTHER_SHARE_MAX, Figures, Usage, figures, other_share, used_since
from bench.peers.texts import repeated_share
from bench.peers.workloads import WORKLOADS, Script, Workload
from bench.serve.client import LoadClient, open_session
from bench.serve.openai_stream import Endpoint, Sampling
from bench.serve.records import RequestRecord, RequestSpec

_WARM_OUTPUT_TOKENS = 8
_CALM_LOOK_S = 0.5
_IN_PROCESS_PATH = "/in_process"


@dataclass(frozen=True)
class Target:
    """A running server."""

    name: str
    base_url: str
    model: str
    root_pid: int
    sends_ignore_eos: bool
    sends_done: bool
    work_share: float


@dataclass(frozen=True)
class Turn:
    """One measurement."""

    server: str
    pair: str
    """Names what it is compared in; with workload and round it seeds the prompts, which are the same for both of a pair."""
    is_in_process: bool = False
    """Whether without HTTP."""


@dataclass(frozen=True)
class Block:
    """What one such process does."""

    workload: str
    round: int
    seed: str
    scale: float
    limit_s: float
    """Of one measurement, seconds."""
    num_retries: int
    """How often a disturbed measurement is made again, at most."""
    tokenizer_file: str
    targets: tuple[Target, ...]
    """Every server that is up."""
    turns: tuple[Turn, ...]
    calm_wait_s: float
    """How long a measurement waits, at most, for the machine to have nothing else to do."""

    def as_json(self) -> bytes:
        """The block's file."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Block:
        """The block of such a file."""
        raw = orjson.loads(data)
        raw["targets"] = tuple(Target(**target) for target in raw["targets"])
        raw["turns"] = tuple(Turn(**turn) for turn in raw["turns"])
        return cls(**raw)


async def play(block: Block) -> AsyncIterator[dict[str, Any]]:
    """Measure every turn of the block; one that fails or takes too long says so in its result, and the others go on."""
    tokenizer = Tokenizer.from_file(block.tokenizer_file)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    for turn in block.turns:
        yield await _play_turn(block, turn, encode)


async def _play_turn(block: Block, turn: Turn, encode: Callable[[str], list[int]]) -> dict[str, Any]:
    names = {"workload": block.workload, "round": block.round, **asdict(turn)}
    for attempt in range(1 + block.num_retries):
        player = _Player(block, turn, encode, attempt)
        begin_s = time.monotonic()
        try:
            async with asyncio.timeout(block.limit_s):
                measured = await player.measure()
        except TimeoutError:
            return {**names, "error": f"not done within {block.limit_s:.0f} s"}
        except aiohttp.ClientError as error:
            return {**names, "error": f"{type(error).__name__}: {error}"}
        if not measured.is_disturbed:
            break
    return {**names, "num_attempts": attempt + 1, "took_s": round(time.monotonic() - begin_s, 2), **measured.as_json()}


class _Player:
    """Plays one turn once."""

    def __init__(self, block: Block, turn: Turn, encode: Callable[[str], list[int]], attempt: int) -> None:
        # A further attempt has prompts of its own, since those of the one before are in prefix caches.
        self._seed = f"{block.seed}/{block.workload}/{block.round}/{turn.pair}/{attempt}"
        self._block = block
        self._turn = turn
        self._workload = WORKLOADS[block.workload]
        self._target = next(target for target in block.targets if target.name == turn.server)
        self._encode = encode

    async def measure(self) -> Figures:
        """Warm up, measure, and reduce to figures."""
        target, workload = self._target, self._workload
        scale = self._block.scale * target.work_share
        scripts = self._scripts("measured", workload.num_scripts_at(scale))
        async with open_session(api_key=None, timeout_s=self._block.limit_s, new_connections=True) as session:
            sampling = Sampling(model=target.model, ignore_eos=target.sends_ignore_eos)
            client = LoadClient(
                session, base_url=target.base_url, endpoint=Endpoint.COMPLETIONS, sampling=sampling, needs_done=target.sends_done
            )
            await self._wait_for_calm()
            await self._warm_up(client)
            before = self._usages()
            proc.reset_peaks(target.root_pid)
            if self._turn.is_in_process:
                records = await play_in_process(session, target.base_url, scripts, workload.num_clients)
            else:
                records = await play_scripts(client, scripts, workload.num_clients)
            used = used_since(before, self._usages())
        memory = proc.read_memory(target.root_pid)
        repeated = self._repeated(scripts, records) if workload.repeats_input else None
        return figures(workload, records, memory=memory, used=used, server=target.name, repeated_share=repeated)

    def _repeated(self, scripts: Sequence[Script], records: Sequence[RequestRecord]) -> float | None:
        """How predictable the answers were from the text before them, over all that came with their text."""
        prompts = {script.index: script.user_texts[0] for script in scripts}
        encode = self._encode
        shares = [repeated_share(encode(prompts[record.index]), encode(record.text)) for record in records if record.text]
        return sum(shares) / len(shares) if shares else None

    async def _wait_for_calm(self) -> None:
        deadline_s = time.monotonic() + self._block.calm_wait_s
        while time.monotonic() < deadline_s:
            before = self._usages()
            await asyncio.sleep(_CALM_LOOK_S)
            if other_share(used_since(before, self._usages())) <= OTHER_SHARE_MAX:
                return

    async def _warm_up(self, client: LoadClient) -> None:
        """A few short answers to prompts of the workload's own length, so that the measurement does nothing for the first time."""
        scripts = self._scripts("warm-up", min(2, self._workload.num_clients))
        short = [Script(script.index, script.user_texts[:1], _WARM_OUTPUT_TOKENS) for script in scripts]
        await play_scripts(client, short, len(short))

    def _scripts(self, purpose: str, num_scripts: int) -> list[Script]:
        seed = f"{self._seed}/{purpose}"
        return self._workload.scripts(seed=seed, num_scripts=num_scripts, count=lambda text: len(self._encode(text)))

    def _usages(self) -> dict[str, Usage]:
        """What each server, this process and the whole machine have used so far."""
        now_s = time.monotonic()
        usages = {target.name: Usage(now_s, proc.tree_cpu_s(target.root_pid)) for target in self._block.targets}
        return usages | {"client": Usage(now_s, time.process_time()), "machine": Usage(now_s, proc.machine_cpu_s())}


async def play_scripts(client: LoadClient, scripts: Sequence[Script], num_clients: int) -> list[RequestRecord]:
    """Keep that many clients busy with scripts, each from its first prompt to its last answer."""
    remaining = iter(scripts)
    records: list[RequestRecord] = []

    async def play_one(script: Script) -> None:
        said = ""
        for number, user_text in enumerate(script.user_texts):
            said += user_text
            index = script.index * len(script.user_texts) + number
            record = await client.send(RequestSpec(index=index, prompt=said, num_output_tokens=script.num_output_tokens))
            records.append(record)
            if not record.is_ok:
                return
            said += record.text

    async def loop() -> None:
        for script in remaining:
            await play_one(script)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(num_clients, len(scripts))):
            group.create_task(loop())
    return sorted(records, key=lambda record: record.index)


async def play_in_process(
    session: aiohttp.ClientSession, base_url: str, scripts: Sequence[Script], num_clients: int
) -> list[RequestRecord]:
    """Have the server play the scripts itself, without HTTP in the loop; its clock is ours. Scripts of one turn only."""
    requests = [
        {"index": script.index, "prompt": script.user_texts[0], "max_tokens": script.num_output_tokens} for script in scripts
    ]
    async with session.post(base_url + _IN_PROCESS_PATH, json={"requests": requests, "concurrency": num_clients}) as response:
        response.raise_for_status()
        answer = await response.json()
    records = [
        RequestRecord(
            index=run["index"],
            started_ns=run["started_ns"],
            ended_ns=run["token_times_ns"][-1],
            chunk_times_ns=run["token_times_ns"],
            usage_prompt_tokens=run["prompt_tokens"],
            usage_output_tokens=len(run["token_times_ns"]),
            finish_reason="length",
        )
        for run in answer["runs"]
    ]
    return sorted(records, key=lambda record: record.index)


def main(block_path: Path, result_path: Path) -> None:
    """Play the block of a file and write its results to another."""
    uvloop.run(_write(Block.from_json(block_path.read_bytes()), result_path))


async def _write(block: Block, result_path: Path) -> None:
    results = []
    async for result in play(block):
        results.append(result)
        unfinished = result_path.with_suffix(".part")
        unfinished.write_bytes(orjson.dumps(results))
        unfinished.replace(result_path)


def supports_in_process(workload: Workload) -> bool:
    """Whether `play_in_process` can play it."""
    return workload.num_turns == 1
