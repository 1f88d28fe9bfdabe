"""Where a benchmark figure comes from: commit, command, machine and date, written beside every result."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent


def provenance(*, secret: str | None = None) -> dict[str, Any]:
    """Commit (with `-dirty` where the tree differs), command line, processor, cores, load, Python and date (UTC).

    `secret` is a text, an API key say, that is blotted out of the command line.
    """
    arguments = [argument.replace(secret, "***") if secret else argument for argument in sys.argv[1:]]
    return {
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *arguments]),
        "cpu_model": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The checkout's commit, or `None` where there is no git or no commit (an installed package)."""
    command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
