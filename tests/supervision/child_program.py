"""Run as a program: a supervised process that behaves, well or badly, as its first argument (JSON) says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

from headrace.lifecycle import State
from headrace.supervision.child import Notifier, attach


def start_grandchildren(behaviour: dict) -> None:
    tag = behaviour["tag"]
    script = f"while :; do sleep 1000; done # {tag}"
    if behaviour.get("grandchild"):
        subprocess.Popen(["sh", "-c", script])
    if behaviour.get("daemon"):
        # Double fork and setsid; the intermediate process ends, so that the daemon has no parent of ours.
        subprocess.Popen(["sh", "-c", f"setsid sh -c '{script}' >/dev/null 2>&1 &"]).wait()
    if behaviour.get("daemon_without_env"):
        subprocess.Popen(["sh", "-c", f"setsid env -i PATH=$PATH sh -c '{script}' >/dev/null 2>&1 &"]).wait()


def flood(num_bytes: int) -> None:
    line = b"x" * 999 + b"\n"
    for _ in range(num_bytes // len(line)):
        os.write(2, line)


def load(behaviour: dict, notifier: Notifier) -> None:
    """Report `load_steps` steps, each after the first once the file `load_gate` and the number of the one before is there."""
    for number in range(behaviour.get("load_steps", 0)):
        notifier.progress({"loaded": number})
        sys.stderr.write(f"loaded {number}\n")
        sys.stderr.flush()
        while not os.path.exists(f"{behaviour['load_gate']}{number}"):
            time.sleep(0.01)


def beat(behaviour: dict, notifier: Notifier, num_steps: int) -> None:
    """Report progress; each report leaves a dot in the file `beat_log`."""
    notifier.progress({"num_steps": num_steps}, is_busy=bool(behaviour.get("busy")))
    if "beat_log" in behaviour:
        with open(behaviour["beat_log"], "a") as file:
            file.write(".")


def main() -> int:
    behaviour = json.loads(sys.argv[1])
    attachment = attach() if behaviour.get("attach", True) else None
    stop = threading.Event()
    if attachment is not None and attachment.standby_fd is not None:
        if "standby_exit" in behaviour:
            return behaviour["standby_exit"]
        attachment.wait_turn()
    if behaviour.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    start_grandchildren(behaviour)
    sys.stderr.write(behaviour.get("stderr", ""))
    sys.stderr.flush()
    time.sleep(behaviour.get("start_s", 0.0))
    flood(behaviour.get("flood_bytes", 0))
    if "exit_before_started" in behaviour:
        if attachment is not None and behaviour.get("says_failed"):
            attachment.notifier.state(State.FAILED, "told before the end")
        return behaviour["exit_before_started"]
    if attachment is not None:
        load(behaviour, attachment.notifier)
        if behaviour.get("heartbeat"):
            attachment.notifier.progress({"num_steps": 0})
        if not behaviour.get("never_started"):
            attachment.notifier.state(State.STARTED)
            attachment.notifier.state(State.READY)
    begin = time.monotonic()
    num_steps = 0
    while not stop.wait(0.05):
        num_steps += 0 if behaviour.get("stuck") else 1
        if behaviour.get("heartbeat") and attachment is not None:
            beat(behaviour, attachment.notifier, num_steps)
        if time.monotonic() - begin > behaviour.get("live_s", 1e9):
            return behaviour.get("exit", 0)
    if attachment is not None:
        attachment.notifier.state(State.DRAINING)
    time.sleep(behaviour.get("drain_s", 0.0))
    if behaviour.get("stop_log"):
        with open(behaviour["stop_log"], "a") as file:
            file.write(behaviour["name"] + "\n")
    return behaviour.get("stop_exit", 0)


if __name__ == "__main__":
    sys.exit(main())
