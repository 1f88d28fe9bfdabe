"""What stops a start: one line that says what to do, and an exit status other than 0."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.process_tree import processes_marked
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow


def serve(directory: Path, **settings: str) -> tuple[int, str]:
    """Run `headrace serve` that is expected to fail; returns the status and the last line of stderr."""
    base = {
        "run_directory": str(directory / "run"),
        "router_http_port": "0",
        "router_grpc_port": "0",
        **{f"telemetry_{name}_metrics_port": "null" for name in ("router", "tokenizer", "scheduler", "worker", "detokenizer")},
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    environment |= {f"HEADRACE_{name.upper()}": value for name, value in (base | settings).items()}
    ended = subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", "serve"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert not processes_marked(f"HEADRACE_RUN_DIRECTORY={directory / 'run'}")
    return ended.returncode, ended.stderr.strip().splitlines()[-1]


def test_unknown_setting(short_tmp_path: Path) -> None:
    status, line = serve(short_tmp_path, router_htp_port="1")
    assert status == 2
    assert "HEADRACE_ROUTER_HTP_PORT" in line
    assert "HEADRACE_ROUTER_HTTP_PORT" in line


def test_model_that_was_not_pulled(short_tmp_path: Path) -> None:
    status, line = serve(short_tmp_path, model_store=str(short_tmp_path))
    assert status == 2
    assert "headrace models pull" in line


def test_corrupt_model_directory(short_tmp_path: Path, default_model_directory: Path) -> None:
    broken = short_tmp_path / "broken"
    shutil.copytree(default_model_directory, broken)
    weights = next(broken.glob("*.gguf"))
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    status, line = serve(short_tmp_path, model_name=str(broken))
    assert status == 2
    assert weights.name in line


def test_busy_port(short_tmp_path: Path, model_store: Path, default_model_directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, line = serve(short_tmp_path, model_store=str(model_store), router_http_port=str(port))
    assert status == 2
    assert str(port) in line


def test_missing_key(short_tmp_path: Path, model_store: Path, default_model_directory: Path) -> None:
    status, line = serve(short_tmp_path, model_store=str(model_store), wire_keys_directory=str(short_tmp_path / "none"))
    assert status == 2
    assert "headrace keys create" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"worker_device": "rocm"}, "worker.device is rocm, but torch"),
        (
            {"worker_device": "cpu", "worker_attention_backend": "triton", "worker_page_size": "128"},
            "page_size must have or be 1 to 64",
        ),
    ],
    ids=["device", "page-size"],
)
def test_what_the_gpu_path_cannot_do_is_refused_at_start(
    short_tmp_path: Path, model_store: Path, default_model_directory: Path, settings: dict[str, str], said: str
) -> None:
    status, line = serve(short_tmp_path, model_store=str(model_store), **settings)
    assert status == 2
    assert said in line
