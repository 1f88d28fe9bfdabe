"""Which GPU each worker of one machine sees: they take them in turn, one a worker.

Read from the kernel's own lists, since neither torch nor a driver's library is needed to start processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def own_gpu(index: int, environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """The variable that leaves one GPU in sight of worker `index`; none where the machine has no GPU.

    A variable that is set already names the GPUs that are shared out, by number or UUID.

    Args:
        index: Of the worker among those of this machine.
        environment: What the worker would inherit.
        root: Where `proc` and `sys` are.

    Source: CUDA C Programming Guide, CUDA_VISIBLE_DEVICES; ROCm, HIP_VISIBLE_DEVICES.
    """
    for variable, num_gpus in (("CUDA_VISIBLE_DEVICES", _num_nvidia(root)), ("HIP_VISIBLE_DEVICES", _num_amd(root))):
        if num_gpus:
            # Set to nothing, it hides all of them.
            named = environment.get(variable)
            gpus = [str(gpu) for gpu in range(num_gpus)] if named is None else [gpu for gpu in named.split(",") if gpu]
            return {variable: gpus[index % len(gpus)]} if gpus else {}
    return {}


def _num_nvidia(root: Path) -> int:
    return sum(1 for _ in (root / "proc/driver/nvidia/gpus").glob("*"))


def _num_amd(root: Path) -> int:
    return sum(_is_gpu(node) for node in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id"))


def _is_gpu(gpu_id: Path) -> bool:
    """Whether a node is a GPU of ours: processors have the number 0, and what a container may not use cannot be read."""
    try:
        return gpu_id.read_text().strip() not in ("", "0")
    except OSError:
        return False
