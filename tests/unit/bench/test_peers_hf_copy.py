"""The plain checkpoint that peers load: the same weights as bfloat16, and one without an end token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.peers.hf_copy import WEIGHTS_FILE, write_endless_copy, write_hf_copy


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = {"a.weight": torch.tensor([[1.0, 1.0 + 2**-9]]), "b.weight": torch.tensor([3.0, -0.5], dtype=torch.bfloat16)}
    save_file(tensors, directory / WEIGHTS_FILE)
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text("{}")
    return directory


def test_weights_become_bfloat16_and_those_that_are_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    write_hf_copy(model, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    # 1 + 2^-9 lies halfway below the next bfloat16 and is rounded to the even one.
    assert tensors["a.weight"].tolist() == [[1.0, 1.0]]
    assert tensors["b.weight"].tolist() == [3.0, -0.5]


def test_a_copy_without_an_end_differs_in_nothing_else(model: Path, tmp_path: Path) -> None:
    write_hf_copy(model, tmp_path / "copy")
    for _ in range(2):
        write_endless_copy(tmp_path / "copy", tmp_path / "endless")
    assert json.loads((tmp_path / "endless" / "config.json").read_text()) == {"eos_token_id": None, "bos_token_id": 1}
    assert (tmp_path / "endless" / WEIGHTS_FILE).samefile(tmp_path / "copy" / WEIGHTS_FILE)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["eos_token_id"] == 2
