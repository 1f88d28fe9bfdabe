"""Tiny checkpoints with matrices quantised in each of the ways that files do it, made of a plain one by rounding to nearest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from gguf.quants import quantize
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import load_file, save_file

from tests.parity.families import assert_near
from tests.unit.worker.quantization.test_checkpoint_matrices import AWQ_ORDER, words_of

GROUP = 16

Tensors = dict[str, torch.Tensor]
"""Of one matrix, by the end of their names."""


def integers(
    weight: torch.Tensor, bits: int, *, group: int = GROUP, is_symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[out, in]`, zero points and float16 scales `[out, groups]`."""
    values = weight.numpy().reshape(len(weight), -1, group)
    if is_symmetric:
        zeros = np.full(values.shape[:2], 1 << (bits - 1))
        scales = np.abs(values).max(axis=2) / ((1 << (bits - 1)) - 1)
    else:
        low, high = np.minimum(values.min(axis=2), 0), values.max(axis=2)
        scales = (high - low) / ((1 << bits) - 1)
        zeros = np.clip(np.rint(-low / scales), 1, (1 << bits) - 1)
    scales = scales.astype(np.float16)
    codes = np.rint(values / scales.astype(np.float32)[:, :, None] + zeros[:, :, None]).clip(0, (1 << bits) - 1)
    return codes.reshape(weight.shape).astype(np.int64), zeros.astype(np.int64), scales


def awq(weight: torch.Tensor) -> Tensors:
    codes, zeros, scales = integers(weight, 4, is_symmetric=False)
    return {
        "qweight": words_of(codes.T, 4, 1, AWQ_ORDER),
        "qzeros": words_of(zeros.T, 4, 1, AWQ_ORDER),
        "scales": torch.from_numpy(scales.T.copy()),
    }


def gptq(weight: torch.Tensor, *, bits: int = 4, is_shuffled: bool = False) -> Tensors:
    codes, zeros, scales = integers(weight, bits, is_symmetric=False)
    groups = np.arange(weight.shape[1]) // GROUP
    if is_shuffled:
        groups = np.random.default_rng(2).permutation(groups)
    return {
        "qweight": words_of(codes.T, bits, 0),
        "qzeros": words_of(zeros.T - 1, bits, 1),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }


def packed(weight: torch.Tensor) -> Tensors:
    codes, _, scales = integers(weight, 4, is_symmetric=True)
    shape = torch.tensor(codes.shape)
    return {"weight_packed": words_of(codes, 4, 1), "weight_scale": torch.from_numpy(scales), "weight_shape": shape}


def int8(weight: torch.Tensor) -> Tensors:
    codes, _, scales = integers(weight, 8, group=weight.shape[1], is_symmetric=True)
    return {"weight": torch.from_numpy((codes - 128).astype(np.int8)), "weight_scale": torch.from_numpy(scales)}


def float8(weight: torch.Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensors:
    scales = weight.abs().amax(dim=1, keepdim=True) / 448
    return {"weight": (weight / scales).to(dtype), "weight_scale": scales}


def float8_blocks(weight: torch.Tensor) -> Tensors:
    """Blocks of 128 x 128, of which the matrices here have one, or parts of two.

    The scales are not made of the weights, so a weight may be larger than the largest e4m3fn times its scale: it is cut off there,
    as torch 2.13's cast does and 2.11's, which gives NaN, does not.
    """
    num_rows, num_columns = (-(-size // 128) for size in weight.shape)
    scales = torch.rand(num_rows, num_columns, generator=torch.Generator().manual_seed(num_rows)) * 1e-3 + 1e-3
    spread = scales.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return {"weight": (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def compressed(stored_format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 8, **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": stored_format, "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}

FORMS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Tensors]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "gptq": (GPTQ, gptq),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, lambda weight: gptq(weight, bits=8)),
    "gptq act-order": (GPTQ | {"desc_act": True}, lambda weight: gptq(weight, is_shuffled=True)),
    "packed int4": (compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}), packed),
    "int8": (compressed("int-quantized", {"strategy": "channel"}), int8),
    "int8 for int8": (compressed("int-quantized", {"strategy": "channel"}, INT8_INPUTS), int8),
    "fp8 rows": (FP8, float8),
    "fp8 e5m2": (FP8 | {"fmt": "e5m2"}, lambda weight: float8(weight, dtype=torch.float8_e5m2)),
    "fp8 blocks": (FP8 | {"weight_block_size": [128, 128]}, float8_blocks),
}
"""By name: what config.json says, and the tensors of a matrix."""

QUANTIZES_INPUTS = {"int8 for int8": 0.04, "fp8 blocks": 0.05}
"""Bounds of the mean difference, by the logits' spread: rounding inputs to 8 bits costs this random network 2.3 and 2.6 %."""

Run = tuple[dict[int, list[int]], list[torch.Tensor]]
"""What `mixed_steps` gives."""

GGUF_TYPES = ("q4_0", "q8_0", "q4_1", "q5_1")
"""Types of the matrices of a layer, in turn, so that those that are stacked differ."""


def assert_agree(form: str, run: Run, torch_run: Run) -> None:
    """The tokens and logits of torch, which unpacks weights; near the first logits where inputs are quantised too."""
    (tokens, logits), (torch_tokens, torch_logits) = run, torch_run
    if form not in QUANTIZES_INPUTS:
        assert tokens == torch_tokens
        assert_near("torch", torch.stack(logits), torch.stack(torch_logits))
        return
    # The two rows of the first step: later ones follow tokens that need not be the same.
    expected = torch.stack(torch_logits[:2])
    difference = float((torch.stack(logits[:2]) - expected).abs().mean() / expected.std())
    assert 1e-3 < difference < QUANTIZES_INPUTS[form]


def quantize_checkpoint(source: Path, target: Path, form: str) -> Path:
    """Write a checkpoint's copy in which all matrices of layers are quantised; the head and the embedding stay as they are."""
    config = json.loads((source / "config.json").read_text())
    plain = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    if form == "gguf":
        shutil.copy(source / "config.json", target)
        _write_gguf(target / "model.gguf", plain, config)
        return target
    scheme, make = FORMS[form]
    tensors: Tensors = {}
    for name, tensor in plain.items():
        if is_matrix(name):
            module = name.removesuffix("weight")
            tensors |= {module + end: part.contiguous() for end, part in make(tensor).items()}
        else:
            tensors[name] = tensor
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    save_file(tensors, target / "model.safetensors")
    return target


def is_matrix(name: str) -> bool:
    return name.endswith("proj.weight")


def _write_gguf(path: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    num_matrices = 0
    for name, tensor in tensors.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        if is_matrix(name):
            kind = GGMLQuantizationType[GGUF_TYPES[num_matrices % len(GGUF_TYPES)].upper()]
            writer.add_tensor(gguf_name, quantize(tensor.numpy(), kind), raw_dtype=kind)
            num_matrices += 1
        else:
            writer.add_tensor(gguf_name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
