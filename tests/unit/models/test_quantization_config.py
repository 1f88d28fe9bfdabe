"""Quantisations that cannot be read are refused by what they are, and none is guessed."""

from __future__ import annotations

import pytest

from headrace.errors import ModelError
from headrace.models.quantization_config import QuantizationScheme, read_scheme


def compressed(group=None, **changes):
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"} | (group or {})
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": {"weights": weights}}} | changes


def with_inputs(inputs):
    return {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "input_activations": inputs}


GOOD = {
    "awq": ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, QuantizationScheme("awq", bits=4)),
    "gptq": ({"quant_method": "gptq", "bits": 8}, QuantizationScheme("gptq", bits=8, zero_offset=1)),
    "gptq v2": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, QuantizationScheme("gptq", bits=4)),
    "gptq with modules left out": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*mlp.*": {}, "+:.*attn.*": {"group_size": 64}}},
        QuantizationScheme("gptq", bits=4, zero_offset=1),
    ),
    "compressed": (compressed(), QuantizationScheme("compressed-tensors")),
    "compressed, its group's own format": (
        compressed({"num_bits": 4}, format="mixed-precision", config_groups={
            "a": {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}},
            "b": {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
        }),
        QuantizationScheme("compressed-tensors"),
    ),
    "compressed blocks": (
        compressed({"type": "float", "strategy": "block", "block_structure": "128x64"}, format="float-quantized"),
        QuantizationScheme("compressed-tensors", block_shape=(128, 64)),
    ),
    "fp8": ({"quant_method": "fp8", "fmt": "e4m3"}, QuantizationScheme("fp8")),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 64]}, QuantizationScheme("fp8", block_shape=(128, 64))),
    "fp8 with inputs": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        QuantizationScheme("fp8", input_type="float8"),
    ),
    "compressed with int8 inputs": (
        compressed(config_groups={"a": with_inputs({"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"})}),
        QuantizationScheme("compressed-tensors", input_type="int8"),
    ),
    "compressed with float8 inputs": (
        compressed(config_groups={"a": with_inputs({"num_bits": 8, "type": "float", "symmetric": True})}),
        QuantizationScheme("compressed-tensors", input_type="float8"),
    ),
    "compressed, inputs with zero points": (
        compressed(config_groups={"a": with_inputs({"num_bits": 8, "type": "int", "symmetric": False})}),
        QuantizationScheme("compressed-tensors"),
    ),
    "compressed, inputs of 4 bits": (
        compressed(config_groups={"a": with_inputs({"num_bits": 4, "type": "int"})}),
        QuantizationScheme("compressed-tensors"),
    ),
    "compressed, inputs of some layers": (
        compressed(config_groups={"a": with_inputs({"num_bits": 8, "type": "int"}), "b": with_inputs(None)}),
        QuantizationScheme("compressed-tensors"),
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, QuantizationScheme("modelopt")),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, QuantizationScheme("mxfp4")),
    "none": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_known_quantisations_are_read(case):
    config, expected = GOOD[case]
    assert read_scheme({"quantization_config": config} if config is not None else {}) == expected


BAD = {
    "unknown method": ({"quant_method": "bitsandbytes"}, r"quant_method is 'bitsandbytes', .*supported: awq, gptq, compressed"),
    "no method": ({}, "quant_method is None"),
    "list for method": ({"quant_method": ["awq"]}, r"quant_method is \['awq'\]"),
    "no object": (["awq"], r"is \['awq'\].*supported: an object"),
    "awq of 3 bits": ({"quant_method": "awq", "bits": 3}, "bits is 3.*supported: 4"),
    "awq layout": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'.*supported: gemm"),
    "awq without zero points": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point is False"),
    "gptq of 2 bits": ({"quant_method": "gptq", "bits": 2}, "bits is 2.*supported: 4, 8"),
    "gptq without bits": ({"quant_method": "gptq"}, "bits is None"),
    "gptq layout": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "gptq of mixed bits": ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic changes bits to 8"),
    "compressed format": (compressed(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'.*pack-quantized, int"),
    "compressed without groups": (compressed(config_groups={}), "config_groups is {}"),
    "compressed of 4-bit floats": (compressed({"type": "float", "num_bits": 4}), "float of 4 bits"),
    "compressed of 3 bits": (compressed({"num_bits": 3}, format="pack-quantized"), "int of 3 bits as pack-quantized"),
    "compressed sparse": (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'.*supported: dense"),
    "compressed rotated": (compressed(transform_config={"R1": {}}), "transform_config"),
    "blocks of nothing": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]"),
    "blocks of text": ({"quant_method": "fp8", "weight_block_size": "big"}, r"weight_block_size is \['big'\]"),
    "modelopt of 4 bits": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'.*supported: FP8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_others_are_refused_by_name(case):
    config, message = BAD[case]
    with pytest.raises(ModelError, match=message) as caught:
        read_scheme({"quantization_config": config})
    assert caught.value.param == "quantization_config"
    assert "\n" not in str(caught.value)
