"""The Python client is a wheel of its own, which carries its generated code and needs nothing of the system."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_clients_wheel_is_built_from_its_sdist_alone(tmp_path: Path) -> None:
    # The tools are here already; the isolated build of the system's own wheel is tested in test_build.py.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT / "clients" / "python")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"headrace_client/py.typed", "headrace_client/client.py", "headrace_client/v1/inference_pb2_grpc.py"} <= names
    assert not any(name.startswith(("headrace/", "services/", "proto/")) for name in names)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import headrace_client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code, str(wheel)], capture_output=True, text=True, timeout=60, check=False)
    assert "headrace_client.v1.inference_pb2" in loaded.stdout, loaded.stderr
    assert not [name for name in loaded.stdout.split() if name.split(".")[0] in {"headrace", "services", "torch", "numpy"}]
