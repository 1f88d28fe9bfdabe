"""Runs the test suites one after the other, each as a pytest of its own within its own time limit, and sums up.

    python tools/run_suites.py [SUITE...]        (default: all)

One suite that fails or hangs does not keep the others from running; the exit status is 0 only when every suite passed. A
suite without a limit below is an error, so none is forgotten, and so is one that should be there and holds no test. A status of
0 is believed only with a report that says that tests ran, and all that were selected (see `suite_process.py`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS_S = {
    "unit": 1200,
    "contract": 600,
    "native": 600,
    "properties": 1200,
    "integration": 900,
    "supervision": 600,
    "parity": 600,
    "kernels": 1200,
    "interpreted": 600,
    "gpu": 900,
    "e2e": 1800,
    "sdk": 600,
    "gateway": 600,
}
"""Suite folder -> seconds until it is stopped: several times what it takes on two cores that nobody else uses; of `e2e`, twice what
it takes without native kernels, and of `kernels` what it takes for a GPU, for which some 700 variants are compiled. In the order in
which they run: what fails fastest comes first."""

NOT_HERE = {"compose", "lm_eval", "node"}
"""Need a Docker engine, lm-eval's own environment, or Node.js: `make compose-test`, `make lm-eval`, `make node-test`."""

MEASURED = {"unit", "contract"}
"""Suites under coverage; the others spend their time in child processes."""

STOPPED = 124
UNPROVEN = 125
"""A status of 0 that the report does not bear out."""


def find_suites(tests: Path) -> list[str]:
    """Return the suites that hold a test, in running order; refuse one that has no limit, and the lack of a required one."""
    found = {path.name for path in tests.iterdir() if path.is_dir() and any(path.rglob("test_*.py"))} - NOT_HERE
    if unknown := found - LIMITS_S.keys():
        sys.exit(f"run_suites: no time limit for tests/{min(unknown)}: add it to LIMITS_S in {__file__}")
    if missing := LIMITS_S.keys() - found:
        sys.exit(f"run_suites: tests/{min(missing)} holds no test")
    return [name for name in LIMITS_S if name in found]


def run_suite(name: str, limit_s: float) -> int:
    """Run one suite; 0 only when its tests ran and passed, 124 past the limit, 125 for a status of 0 without proof."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        status = _run(name, limit_s, report)
        if status == 0 and (doubt := doubt_of(report)):
            print(f"run_suites: tests/{name} ended with status 0, but {doubt}", file=sys.stderr)
            return UNPROVEN
        return status


def doubt_of(report: Path) -> str | None:
    """Say why a status of 0 is not to be believed, or None."""
    if not report.exists():
        return "its process left before its session was over"
    counts = json.loads(report.read_text())
    if counts["ended"] < counts["selected"]:
        return f"only {counts['ended']} of {counts['selected']} tests ran"
    return None if counts["passed"] else f"none of its {counts['selected']} tests passed"


def _run(name: str, limit_s: float, report: Path) -> int:
    """Run one suite in a session of its own; past the limit its whole process group is killed."""
    command = [sys.executable, str(Path(__file__).with_name("suite_process.py")), str(report), f"tests/{name}"]
    if name in MEASURED:
        command += ["--cov", "--cov-append", "--cov-report="]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        print(f"run_suites: tests/{name} did not end within {limit_s} s: killed", file=sys.stderr)
        return STOPPED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(names: list[str]) -> int:
    """Run the named suites, or all, and print one line for each."""
    root = Path(__file__).resolve().parent.parent
    os.chdir(root)
    Path(".coverage").unlink(missing_ok=True)
    lines, num_failed = [], 0
    for name in names or find_suites(root / "tests"):
        print(f"\n=== tests/{name} (limit {LIMITS_S[name]} s)", flush=True)
        start = time.monotonic()
        status = run_suite(name, LIMITS_S[name])
        num_failed += status != 0
        lines.append(f"  {name:12} {'passed' if status == 0 else f'FAILED (status {status})':20} {time.monotonic() - start:6.1f} s")
    if MEASURED & set(names or MEASURED):
        print("\n=== coverage of the unit and contract suites", flush=True)
        subprocess.run([sys.executable, "-m", "coverage", "report", "--skip-covered"], timeout=120, check=False)
    print("\n=== suites", *lines, sep="\n")
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
