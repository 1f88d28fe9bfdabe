"""Goal: workers of one machine take its GPUs in turn. Method: folders like those of the kernel's drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.cli import serve
from headrace.cli.gpus import own_gpu
from headrace.config.load import load_settings


def nvidia(root: Path, num_gpus: int) -> Path:
    for gpu in range(num_gpus):
        (root / f"proc/driver/nvidia/gpus/0000:{gpu:02}:00.0").mkdir(parents=True)
    return root


def amd(root: Path, *gpu_ids: str) -> Path:
    for node, gpu_id in enumerate(gpu_ids):
        directory = root / f"sys/class/kfd/kfd/topology/nodes/{node}"
        directory.mkdir(parents=True)
        (directory / "gpu_id").write_text(f"{gpu_id}\n")
    return root


def test_workers_take_gpus_in_turn(tmp_path: Path) -> None:
    root = nvidia(tmp_path, 2)
    assert [own_gpu(index, {}, root) for index in range(3)] == [{"CUDA_VISIBLE_DEVICES": number} for number in ("0", "1", "0")]


def test_processors_among_the_nodes_of_amd_are_no_gpus(tmp_path: Path) -> None:
    root = amd(tmp_path, "0", "51234", "0", "51235")
    assert [own_gpu(index, {}, root) for index in range(3)] == [{"HIP_VISIBLE_DEVICES": number} for number in ("0", "1", "0")]


def test_gpus_that_may_not_be_used_are_none_of_ours(tmp_path: Path) -> None:
    root = amd(tmp_path, "51234", "51235")
    hidden = root / "sys/class/kfd/kfd/topology/nodes/0/gpu_id"
    hidden.unlink()
    # As good as refused, and so for root too: what is read is no file.
    hidden.mkdir()
    assert [own_gpu(index, {}, root) for index in range(2)] == [{"HIP_VISIBLE_DEVICES": "0"}] * 2


@pytest.mark.parametrize(
    ("named", "first", "second"), [("4,GPU-8f", {"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "GPU-8f"}), ("", {}, {})]
)
def test_gpus_that_are_named_already_are_shared_out(tmp_path: Path, named: str, first: dict, second: dict) -> None:
    root, environment = nvidia(tmp_path, 8), {"CUDA_VISIBLE_DEVICES": named}
    assert [own_gpu(index, environment, root) for index in range(2)] == [first, second]


def test_a_machine_without_one_sets_nothing(tmp_path: Path) -> None:
    assert own_gpu(0, {}, tmp_path) == {}


@pytest.mark.parametrize(
    ("num_workers", "named", "seen"), [(1, None, [None]), (2, None, ["0", "1"]), (2, "4,5", ["4", "5"]), (2, "", [None, None])]
)
def test_a_single_worker_sees_what_the_machine_has_and_more_share_what_is_named(
    num_workers: int, named: str | None, seen: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = nvidia(tmp_path, 2)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(serve, "own_gpu", lambda index, environment: own_gpu(index, environment, root))
    settings = load_settings(flags={"serve.worker_replicas": num_workers})
    specs = {spec.name: spec for spec in serve.local_specs(settings, {})}
    assert [specs[f"worker-{index}"].env.get("CUDA_VISIBLE_DEVICES") for index in range(num_workers)] == seen
    assert "CUDA_VISIBLE_DEVICES" not in specs["router-0"].env
