"""The build hook of the client: compiles the public protos into headrace_client/v1. `python hatch_build.py` does the same by hand.

In the repository the protos stand two folders up, in the sdist beside this file. The generated modules import each other from
`headrace_client.v1`: the client needs nothing of the system, and gets along with it in one process.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTOS = ("common", "control", "tokenizer", "inference")
COMPILE_TIMEOUT_S = 120


def compile_protos(root: Path) -> None:
    """Generate the package; raise with the compiler's own words when it refuses."""
    import grpc_tools

    source = next(path for path in (root / "proto", root.parent.parent / "proto") if path.is_dir())
    target = root / "headrace_client" / "v1"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
        command += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
        command += [f"headrace/v1/{name}.proto" for name in PROTOS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the protobuf compiler stopped with status {done.returncode}:\n{done.stderr.rstrip()}")
        for made in sorted(Path(out, "headrace", "v1").iterdir()):
            text = re.sub(r"^from headrace\.v1 import", "from headrace_client.v1 import", made.read_text(), flags=re.MULTILINE)
            if not (target / made.name).is_file() or (target / made.name).read_text() != text:
                (target / made.name).write_text(text)
    (target / "__init__.py").touch()


class ProtoHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before a wheel or an editable install is built."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the package."""
        compile_protos(Path(self.root))


if __name__ == "__main__":
    compile_protos(Path(__file__).resolve().parent)
