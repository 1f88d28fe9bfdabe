"""Run as a program: a supervised process that is itself a small supervisor, as a worker's launcher is for its ranks."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import structlog

from headrace.lifecycle import State
from headrace.supervision.child import attach
from headrace.supervision.limits import ProcessSpec, SupervisionLimits
from headrace.supervision.supervisor import Supervisor


def main() -> int:
    tag, num_ranks = sys.argv[1], int(sys.argv[2])
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    attachment = attach()
    ready: set[str] = set()

    def on_state(name: str, state: State, detail: str) -> None:
        if state is State.READY:
            ready.add(name)
            if len(ready) == num_ranks:
                attachment.notifier.state(State.STARTED)
                attachment.notifier.state(State.READY)

    specs = []
    for rank in range(num_ranks):
        behaviour = json.dumps({"tag": tag, "name": f"rank{rank}", "grandchild": True, "daemon": True})
        argv = [sys.executable, str(Path(__file__).with_name("child_program.py")), behaviour]
        specs.append(ProcessSpec(f"rank{rank}", argv, restart="never"))
    run_directory = Path(os.environ["HEADRACE_RUN_DIRECTORY"]) / "ranks"
    supervisor = Supervisor(specs, settings=SupervisionLimits(), on_state=on_state, run_directory=run_directory)
    return asyncio.run(supervisor.run())


if __name__ == "__main__":
    sys.exit(main())
