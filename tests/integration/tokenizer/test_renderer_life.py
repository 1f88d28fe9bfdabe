"""A renderer does not outlive its tokenizer, however that ends. Looks at /proc, not at anyone's bookkeeping."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PARENT = """
import sys, threading
from services.tokenizer.renderer import Renderer, RenderLimits

endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
template = "{% if messages[0].content == 'loop' %}" + endless + "{% endif %}"
renderer = Renderer(template, special_tokens={}, model="m", limits=RenderLimits(60, 1 << 28, 1000))
renderer.start()
if sys.argv[1] == "busy":
    loop = [{"role": "user", "content": "loop"}]
    threading.Thread(
        target=renderer.render, args=(loop,), kwargs={"add_generation_prompt": False, "continue_final_message": False}, daemon=True
    ).start()
print(renderer.pid, flush=True)
sys.stdin.read()
"""


def _wait_until(condition: Callable[[], bool]) -> None:
    # The test's own timeout bounds it.
    while not condition():
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("occupation", ["idle", "busy"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_renderer_ends_with_its_tokenizer(occupation: str, signum: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, occupation], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        renderer_pid = int(parent.stdout.readline())
        assert _is_alive(renderer_pid)
        parent.send_signal(signum)
        parent.wait()
        _wait_until(lambda: not _is_alive(renderer_pid))
