"""From `headrace serve` to the first token: `python -m bench.startup`.

Starts the default deployment on free ports, asks for one token as soon as it says that it is ready, stops it, and tells how long it
took, with what each service says of its own start. A first start, which is not counted, has the files in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from bench.free_ports import free_ports
from bench.machine import provenance

LIMIT_S: Final = 6.0
"""To the first token, warm, on two cores."""
TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 20.0
_PORTS: Final = ("router.http_port", "router.grpc_port")
_METRICS: Final = ("router", "tokenizer", "scheduler", "worker", "detokenizer")


@dataclass(slots=True)
class Start:
    """One start. `phases` is what each service says: name of the service → phase → seconds."""

    ready_s: float = 0.0
    first_token_s: float = 0.0
    phases: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(model: str, *, arguments: list[str]) -> Start:
    """Start, ask, stop.

    Args:
        model: The model's name, for the request.
        arguments: Further options of `headrace serve`.

    Raises:
        TimeoutError: It was not ready in time.
    """
    http_port, grpc_port = free_ports(2)
    ports = {"router-http-port": http_port, "router-grpc-port": grpc_port}
    ports |= {f"telemetry-{service}-metrics-port": 0 for service in _METRICS}
    options = [part for name, port in ports.items() for part in (f"--{name}", str(port))]
    start = Start()
    with tempfile.TemporaryDirectory(prefix="hr-start-", dir="/tmp") as folder, (Path(folder) / "log").open("w+") as lines:
        command = [sys.executable, "-m", "headrace.cli.main", "serve", "--run-directory", f"{folder}/run", *options, *arguments]
        command += ["--router-data-directory", f"{folder}/data", "--telemetry-log-output", "json"]
        begun_s = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=lines, text=True)
        try:
            assert process.stdout is not None
            _wait_ready(process.stdout, lines)
            start.ready_s = time.monotonic() - begun_s
            _first_token(http_port, model)
            start.first_token_s = time.monotonic() - begun_s
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_TIMEOUT_S)
        lines.seek(0)
        start.phases = _phases(lines)
    return start


def _wait_ready(output: IO[str], lines: IO[str]) -> None:
    is_readable, _, _ = select.select([output], [], [], TIMEOUT_S)
    if not is_readable or not output.readline().startswith("headrace ready"):
        lines.seek(0)
        raise TimeoutError(f"headrace serve was not ready within {TIMEOUT_S} s; it said: {lines.read()[-2000:]}")


def _first_token(port: int, model: str) -> None:
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        answer.read()


def _phases(lines: IO[str]) -> dict[str, dict[str, float]]:
    """What lines of `start.measured` say, and the worker's trying out of its kernels."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        try:
            event: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") in ("start.measured", "model.warmed_up"):
            seconds = {key.removesuffix("_s"): value for key, value in event.items() if key.endswith("_s")}
            found.setdefault(str(event.get("service")), {}).update(seconds)
    return found


def main(arguments: list[str]) -> int:
    """Print the figures; exit status 1 when the median start takes longer than `LIMIT_S`."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name in the store")
    parser.add_argument("--starts", type=int, default=3, help="starts that count; one goes before them")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    options = parser.parse_args(arguments)
    if options.starts < 1:
        parser.error(f"--starts is {options.starts}, not 1 or more")
    serve = ["--model-name", options.model]
    starts = [measure(options.model, arguments=serve) for _ in range(options.starts + 1)][1:]
    for start in starts:
        print(f"ready after {start.ready_s:.2f} s, first token after {start.first_token_s:.2f} s")
    for service, phases in starts[-1].phases.items():
        print(f"  {service:12} {', '.join(f'{name} {seconds:.2f}' for name, seconds in phases.items())}")
    median_s = statistics.median(start.first_token_s for start in starts)
    print(f"median {median_s:.2f} s on {len(os.sched_getaffinity(0))} CPUs; the limit is {LIMIT_S} s")
    if options.json is not None:
        document = {"provenance": provenance(), "median_s": median_s, "starts": [asdict(start) for start in starts]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if median_s <= LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
