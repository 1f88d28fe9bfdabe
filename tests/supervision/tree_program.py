"""Run as a program: a supervisor over the processes that a JSON file describes; states go to a file as JSON lines."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import structlog

from headrace.errors import ConfigError
from headrace.lifecycle import State
from headrace.supervision import member
from headrace.supervision.limits import ProcessSpec, SupervisionLimits
from headrace.supervision.stderr_relay import StderrRelay
from headrace.supervision.supervisor import Supervisor


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    if "clock_path" in plan:
        clock = Path(plan["clock_path"])
        # Deadlines of starts and stalls are counted on it; pauses before restarts and steps of a stop go by the loop's own.
        time.monotonic_ns = lambda: int(float(clock.read_text()) * 1e9)
    # How long a process takes to get its core, and to write its dump, is for the machine to say.
    member.DUMP_WAIT_S = plan.get("dump_wait_s", member.DUMP_WAIT_S)
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    lines = relay = None
    if plan.get("tells_as_serve"):
        from headrace.cli.serve import StateLines
        from headrace.telemetry import logs

        relay = StderrRelay()
        logs.configure(service="supervisor", instance="serve", take_stderr=relay.write)
        lines = StateLines()

    def on_state(name: str, state: State, detail: str) -> None:
        if lines is not None:
            lines(name, state, detail or "http://127.0.0.1:1")
        with open(plan["states_path"], "a") as states:
            states.write(json.dumps([name, state.value, detail]) + "\n")
        if state is State.READY and plan.get("fails_at_ready"):
            raise OSError("the callback failed")

    async def run() -> int:
        specs = [ProcessSpec(**{**spec, "start_after": tuple(spec.get("start_after", ()))}) for spec in plan["specs"]]
        run_directory = Path(plan["run_directory"])
        limits = SupervisionLimits(**plan["limits"])
        return await Supervisor(specs, settings=limits, on_state=on_state, run_directory=run_directory, relay=relay).run()

    try:
        if plan.get("uvloop"):
            import uvloop

            return uvloop.run(run())
        return asyncio.run(run())
    except ConfigError as error:
        print(f"config error: {error.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
