"""Goal: the short import is the same torch, and what it leaves out can still be had. Each in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100).stdout.strip()


def test_import_leaves_out_what_it_names_and_computes_the_same() -> None:
    product = "torch.nn.functional.linear(torch.arange(6.).view(2, 3), torch.ones(4, 3)).bfloat16().tolist()"
    ours = run(
        "import sys; from services.worker.torch_import import LEFT_OUT, import_torch; torch = import_torch();"
        f"assert LEFT_OUT not in sys.modules and not hasattr(torch, '_meta_registrations'); print({product})"
    )
    assert ours == run(f"import torch; print({product})")


def test_what_was_left_out_is_imported_when_it_is_wanted() -> None:
    told = run(
        "from services.worker.torch_import import import_torch; torch = import_torch(); import torch._meta_registrations;"
        "import torch._inductor, torch.profiler;"
        "print(torch.empty(3, 4, device='meta').matmul(torch.empty(4, 5, device='meta')).shape)"
    )
    assert told == "torch.Size([3, 5])"


def test_torch_that_was_not_tried_is_imported_whole() -> None:
    told = run(
        "from services.worker import torch_import; torch_import.TRIED_VERSIONS = ('0.0.',); torch = torch_import.import_torch();"
        "print(hasattr(torch, '_meta_registrations'))"
    )
    assert told == "True"
