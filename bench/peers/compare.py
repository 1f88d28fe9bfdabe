"""The comparison: which servers are up, what is measured in which order, and the processes that measure it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import orjson

from bench.free_ports import free_ports
from bench.machine import provenance
from bench.peers import proc, report, servers
from bench.peers.block import Block, Target, Turn, supports_in_process
from bench.peers.layout import Layout
from bench.peers.running import RunningServer, running
from bench.peers.servers import OURS, ServerSpec
from bench.peers.steps import tail
from bench.peers.workloads import WORKLOADS
from headrace.models.model_config import TOKENIZER_FILE

PEER_SERVERS: dict[str, Callable[[Layout, int], ServerSpec]] = {
    "vllm": servers.vllm,
    "vllm-ngram": servers.vllm_ngram,
    "llamacpp": servers.llamacpp,
    "llamacpp-q4": servers.llamacpp_q4,
    "llamacpp-ngram": servers.llamacpp_ngram,
    "openvino": servers.openvino,
    "transformers": servers.transformers,
}
IN_PROCESS_PEERS = {"openvino"}
_MEASURE_UNDER_WAIT_S = 3600
"""How long a block may wait for `measure_under` to let it begin."""
_BESIDE_S = 30
"""For what a measuring process does beside its measurements: starting, making prompts."""


@dataclass(frozen=True)
class Comparison:
    """What one run does."""

    layout: Layout
    workloads: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    scale: float
    seed: str
    checkout: Path
    """Ours is served from here."""
    our_options: tuple[str, ...]
    in_process: bool
    turn_limit_s: float
    retries: int
    """Of a measurement that something else on the machine disturbed."""
    calm_wait_s: float
    """How long a measurement waits, at most, for the machine to have nothing else to do."""
    measure_under: tuple[str, ...]
    """A command that each measuring process is run by: one that keeps other work off the machine, say."""
    python: str


def turns(workload: str, peers: Sequence[str], round_index: int, *, in_process: bool) -> tuple[Turn, ...]:
    """The order of one round: ours, a peer, ours, the next peer ...; each round begins with another peer."""
    at = round_index % len(peers)
    found: list[Turn] = []
    for peer in [*peers[at:], *peers[:at]]:
        found += [Turn(OURS, pair=peer), Turn(peer, pair=peer)]
        if in_process and peer in IN_PROCESS_PEERS and supports_in_process(WORKLOADS[workload]):
            pair = f"{peer}/in-process"
            found += [Turn(OURS, pair=pair), Turn(peer, pair=pair, is_in_process=True)]
    return tuple(found)


def run(comparison: Comparison, *, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Start all servers, measure every workload in every round, and keep what is measured in `out` as it comes.

    Raises:
        ServerError: A server cannot be started.
    """
    with _terminated_as_interrupt(), tempfile.TemporaryDirectory(prefix="headrace-peers-") as scratch:
        specs = _specs(comparison, Path(scratch))
        with running(specs, logs=comparison.layout.logs, say=say) as started:
            described = {
                name: {
                    "about": server.spec.about,
                    "argv": list(server.spec.argv),
                    "env": dict(server.spec.env),
                    "ready_s": round(ready_s, 2),
                    "memory_ready": proc.read_memory(server.pid).as_json(),
                }
                for name, (server, ready_s) in started.items()
            }
            servers_up = {name: server for name, (server, _) in started.items()}
            measurements: list[dict[str, Any]] = []
            for block in blocks(comparison, _targets(servers_up)):
                measurements += _measure(comparison, _without_ended(block, servers_up, say), Path(scratch), say)
                settings = _settings(comparison)
                result = report.as_json(measurements, provenance=provenance(), servers=described, settings=settings)
                out.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    return result


def _specs(comparison: Comparison, scratch: Path) -> list[ServerSpec]:
    own_port, *ports = free_ports(1 + len(comparison.peers))
    run_directory = scratch / "run"
    own = servers.headrace(comparison.checkout, port=own_port, options=comparison.our_options, run_directory=run_directory)
    # The slowest to start comes first, so that none waits long and idle for it.
    return [*(PEER_SERVERS[peer](comparison.layout, port) for peer, port in zip(comparison.peers, ports, strict=True)), own]


def _settings(comparison: Comparison) -> dict[str, Any]:
    return {
        "workloads": list(comparison.workloads),
        "peers": list(comparison.peers),
        "rounds": comparison.rounds,
        "scale": comparison.scale,
        "seed": comparison.seed,
        "checkout": str(comparison.checkout),
        "our_options": list(comparison.our_options),
    }


def _targets(started: Mapping[str, RunningServer]) -> tuple[Target, ...]:
    return tuple(
        Target(
            name=name,
            base_url=server.spec.base_url,
            model=server.spec.model,
            root_pid=server.pid,
            sends_ignore_eos=server.spec.sends_ignore_eos,
            sends_done=server.spec.sends_done,
            work_share=server.spec.work_share,
        )
        for name, server in started.items()
    )


def blocks(comparison: Comparison, targets: tuple[Target, ...]) -> list[Block]:
    """All blocks in their order: round by round, so that a run that is cut off has whole rounds."""
    return [
        Block(
            workload=workload,
            round=round_index,
            seed=comparison.seed,
            scale=comparison.scale,
            limit_s=comparison.turn_limit_s,
            num_retries=comparison.retries,
            tokenizer_file=str(comparison.layout.hf_model / TOKENIZER_FILE),
            targets=targets,
            turns=turns(workload, comparison.peers, round_index, in_process=comparison.in_process),
            calm_wait_s=comparison.calm_wait_s,
        )
        for round_index in range(comparison.rounds)
        for workload in comparison.workloads
    ]


def _without_ended(block: Block, started: Mapping[str, RunningServer], say: Callable[[str], None]) -> Block:
    """The block without the pairs that a server is missing for."""
    ended = {name for name, server in started.items() if not server.is_alive}
    for name in sorted(ended):
        say(f"{block.workload} round {block.round + 1}: {name} has ended; its log: {started[name].log_path}")
    missing = {turn.pair for turn in block.turns if turn.server in ended}
    return replace(block, turns=tuple(turn for turn in block.turns if turn.pair not in missing))


def _measure(comparison: Comparison, block: Block, scratch: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Play a block in a process of its own."""
    block_path, result_path, log_path = scratch / "block.json", scratch / "result.json", scratch / "block.log"
    block_path.write_bytes(block.as_json())
    result_path.unlink(missing_ok=True)
    command = [*comparison.measure_under, comparison.python, "-m", "bench.peers", "block", str(block_path), str(result_path)]
    limit_s = _MEASURE_UNDER_WAIT_S + len(block.turns) * (1 + block.num_retries) * (block.limit_s + _BESIDE_S)
    begin_s = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            log.write(f"not done within {limit_s:.0f} s\n".encode())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    results: list[dict[str, Any]] = orjson.loads(result_path.read_bytes()) if result_path.exists() else []
    # What was not reached when the process ended, for whatever reason, is an error each.
    if missing := block.turns[len(results) :]:
        error = f"the measuring process ended with status {process.returncode}: {tail(log_path)}"
        names = {"workload": block.workload, "round": block.round, "error": error}
        results += [{**names, **asdict(turn)} for turn in missing]
        say(f"{block.workload} round {block.round + 1}: {error}")
    took_s = time.monotonic() - begin_s
    say(f"{block.workload} round {block.round + 1} of {comparison.rounds}, {took_s:.0f} s: {_in_short(results)}")
    return results


def _in_short(results: Sequence[dict[str, Any]]) -> str:
    """Tokens a second by server."""
    said = []
    for result in results:
        figure = "failed" if "error" in result else f"{result['summary']['output_tokens_per_s']:.0f}"
        said.append(f"{report.label(result)} {figure}")
    return ", ".join(said) + " tok/s"


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that servers are stopped."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
