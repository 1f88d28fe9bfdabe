"""Goal: on a GPU a family computes what torch computes on the CPU, with graphs and without. Method: tiny random checkpoints, the
same plans to both. float32 on a GPU is torch's own, without TF32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interpreted.quantizing import FORMS, assert_agree, quantize_checkpoint
from tests.parity.families import FAMILIES, assert_near, make_checkpoint

pytestmark = pytest.mark.gpu

NAMES = [name for name in FAMILIES if " " not in name]


def make_driver(directory: Path, device: str, **changes: Any) -> Any:
    from services.worker.backend_choice import DeviceOptions
    from tests.interpreted.running import load, options_for
    from tests.parity.conftest import Driver

    device_options = DeviceOptions(device=device, attention_backend="auto", **changes)
    backend = "torch" if device == "cpu" else "auto"
    runner, report = load(options_for(directory, "auto", backend=backend, device=device_options))
    return Driver(runner), report


@pytest.mark.parametrize("batch_sizes", [(), (1, 2, 4)], ids=["launched", "graphs"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_tokens_and_logits_of_the_cpu(
    name: str, batch_sizes: tuple[int, ...], tmp_path: Path, gpu: torch.device
) -> None:
    from services.worker.device import find_device
    from tests.interpreted.running import mixed_steps

    make_checkpoint(FAMILIES[name], tmp_path)
    driver, report = make_driver(tmp_path, find_device("auto")[0].name, graph_batch_sizes=batch_sizes)
    assert report.device.graph_batch_sizes == batch_sizes
    tokens, logits = mixed_steps(driver)
    expected, expected_logits = mixed_steps(make_driver(tmp_path, "cpu")[0])
    assert tokens == expected
    assert_near("torch", torch.stack([each.cpu() for each in logits]), torch.stack(expected_logits))


@pytest.mark.parametrize("form", [*FORMS, "gguf"])
def test_a_gpu_multiplies_quantised_weights_as_the_cpu_does_unpacked_ones(form: str, tmp_path: Path, gpu: torch.device) -> None:
    from services.worker.device import find_device
    from tests.interpreted.running import mixed_steps

    plain = tmp_path / "plain"
    make_checkpoint(FAMILIES["llama" if form == "gguf" else "llama biases"], plain, intermediate_size=160)
    quantize_checkpoint(plain, tmp_path, form)
    driver, _ = make_driver(tmp_path, find_device("auto")[0].name, graph_batch_sizes=(1, 2, 4))
    tokens, logits = mixed_steps(driver)
    assert_agree(form, (tokens, [each.cpu() for each in logits]), mixed_steps(make_driver(tmp_path, "cpu")[0]))


def test_draws_and_penalties_on_a_gpu_are_those_of_the_cpu(tmp_path: Path, gpu: torch.device) -> None:
    from services.worker.device import find_device
    from tests.interpreted.running import token_ids

    make_checkpoint(FAMILIES["llama"], tmp_path)
    outputs = []
    for device in (find_device("auto")[0].name, "cpu"):
        driver, _ = make_driver(tmp_path, device)
        driver.enter(0, token_ids(5, seed=1), temperature=0.8, top_p=0.9, top_k=50, seed=3)
        driver.enter(1, token_ids(4, seed=2), temperature=1.2, min_p=0.02, seed=4, presence_penalty=1.0, repetition_penalty=1.2)
        outputs.append([driver.step({0: 5, 1: 4})[0], *(driver.step({0: 1, 1: 1})[0] for _ in range(6))])
    assert outputs[0] == outputs[1]
