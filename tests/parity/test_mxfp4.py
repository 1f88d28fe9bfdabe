"""Goal: GPT-OSS' published form, experts packed in mxfp4, computes as transformers computes it expanded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from headrace.models.description import check_complete
from headrace.models.expert_weights import with_single_experts
from headrace.models.model_config import load_model_config
from headrace.models.weights import open_weights
from tests.parity.families import GPT_OSS, Family, assert_near, make_checkpoint

# Multiples of a block, which is 32 values.
FAMILY = Family("GptOssConfig", {**GPT_OSS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2})


def write_mxfp4(model: Any, directory: Path) -> None:
    """Put random packed experts in place of the model's own, in the files and, expanded, in the model."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    state = model.state_dict()
    for name, values in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = values.to(torch.bfloat16)
            values.copy_(tensors[name])
            continue
        num_experts, num_columns, num_rows = values.shape
        blocks = torch.randint(0, 256, (num_experts, num_rows, num_columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        values.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_packed_experts_give_the_logits_of_transformers(tmp_path: Path, make_driver: Callable[..., Any]) -> None:
    model = make_checkpoint(FAMILY, tmp_path)
    write_mxfp4(model, tmp_path)
    driver = make_driver(tmp_path)
    prompt = torch.randint(0, 251, (30,), generator=torch.Generator().manual_seed(4)).tolist()
    driver.enter(0, prompt)
    driver.step({0: 21})
    _, logits = driver.step({0: 9})
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt])).logits[0, -1]
    assert_near("torch", logits[0], theirs)


def test_packed_experts_are_described_one_by_one(tmp_path: Path) -> None:
    model = make_checkpoint(FAMILY, tmp_path)
    num_parameters = sum(values.numel() for values in model.state_dict().values())
    write_mxfp4(model, tmp_path)
    weights = with_single_experts(open_weights(tmp_path))
    check_complete(weights, load_model_config(tmp_path), tmp_path)
    infos = [weights.info(name) for name in weights.names()]
    assert sum(torch.Size(info.shape).numel() for info in infos) == num_parameters
    assert {info.dtype_name for info in infos} == {"bf16", "mxfp4"}
