"""Write a model of our store as a plain bfloat16 checkpoint in Hugging Face layout, for servers that read no GGUF.

The weights are those that our own worker computes with (a quantised file's, unpacked), rounded to bfloat16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from headrace.models.model_config import CONFIG_FILE, GENERATION_CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from headrace.models.weights import open_weights

WEIGHTS_FILE = "model.safetensors"
_SIDE_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
_END_KEYS = ("eos_token_id",)


def write_hf_copy(model: Path, directory: Path) -> None:
    """Write `directory` from the model directory `model`; what is there of an earlier copy is replaced.

    Raises:
        ModelError: The model's weights cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = open_weights(model)
    tensors = {name: _as_bfloat16(weights.load(name)) for name in weights.names()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    for name in _SIDE_FILES:
        shutil.copyfile(model / name, directory / name)


def write_endless_copy(model: Path, directory: Path) -> None:
    """Write `directory` as the checkpoint `model` without an end token: it generates for as long as it is asked to."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        target = directory / name
        target.unlink(missing_ok=True)
        target.hardlink_to(model / name)
    for name in (CONFIG_FILE, GENERATION_CONFIG_FILE):
        (directory / name).write_text(json.dumps(without_end(json.loads((model / name).read_text())), indent=2) + "\n")


def without_end(config: dict[str, Any]) -> dict[str, Any]:
    """The same settings with no end token."""
    return {key: None if key in _END_KEYS else value for key, value in config.items()}


def _as_bfloat16(array: npt.NDArray[Any]) -> torch.Tensor:
    """`[...]` as `Weights.load` gives it (raw uint16 stands for bfloat16) to a bfloat16 tensor of the same shape."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array).to(torch.bfloat16)
