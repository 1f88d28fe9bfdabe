"""Our planner and vLLM's V1 scheduler beside each other: one run, one machine, the same loads, in turn.

    python -m bench.micro.vllm_scheduler --vllm-python PATH --model DIRECTORY [--rounds N] [--json FILE]

PATH is a Python that can import vLLM; DIRECTORY is a model in Hugging Face layout, of which vLLM reads the configuration. A decode
step of all running sequences: plan and result for us, schedule and update for vLLM; prefix caching on, 16 tokens a page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from bench.machine import provenance
from bench.micro.scheduler import measure

NUM_RUNNING: Final = (64, 256, 1024)
NUM_WAITING: Final = (0, 1000)
NUM_STEPS: Final = 100
_TIMEOUT_S: Final = 600
_SIDE: Final = Path(__file__).with_name("vllm_side.py")


class VllmError(RuntimeError):
    """vLLM cannot be measured; the message has the end of what it said."""


def measure_vllm(python: str, model: str, num_running: int, num_waiting: int) -> dict[str, Any]:
    """One load, in a process of its own.

    Raises:
        VllmError: It failed.
    """
    command = [python, str(_SIDE), model, str(num_running), str(num_waiting), str(NUM_STEPS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise VllmError(f"{python} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise VllmError(f"{python} ended with status {error.returncode}: {error.stderr[-600:]}") from error
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        raise VllmError(f"{python} gave no figures: {error!r}") from error
    return found


def main(arguments: list[str]) -> int:
    """Measure all loads in turn; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="a Python that can import vLLM")
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured, one after the other")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    lines = []
    print(f"{'running':>8} {'waiting':>8} {'ours ms':>9} {'vLLM ms':>9} {'ratio':>7}")
    for num_running in NUM_RUNNING:
        for num_waiting in NUM_WAITING:
            ours, theirs = [], []
            for _ in range(options.rounds):
                mine = measure(num_running, num_waiting=num_waiting, load="steady", policy="fcfs", num_steps=NUM_STEPS)
                ours.append(float(str(mine["step_us"])) / 1e3)
                try:
                    found = measure_vllm(options.vllm_python, options.model, num_running, num_waiting)
                except VllmError as error:
                    print(f"nothing measured: {error}", file=sys.stderr)
                    return 2
                theirs.append(found["step_us"] / 1e3)
            line = {
                "running": num_running,
                "waiting": num_waiting,
                "ours_ms": round(statistics.median(ours), 3),
                "vllm_ms": round(statistics.median(theirs), 3),
                "vllm_version": found["version"],
            }
            lines.append(line)
            ratio = line["vllm_ms"] / line["ours_ms"]
            print(f"{num_running:>8} {num_waiting:>8} {line['ours_ms']:>9.3f} {line['vllm_ms']:>9.3f} {ratio:>6.1f}x", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"provenance": provenance(), "figures": lines}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
