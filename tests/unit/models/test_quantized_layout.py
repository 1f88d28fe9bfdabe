"""Parts of quantised matrices: found by name, checked against one another before anything is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from headrace.errors import ModelError
from headrace.models.quantization_config import QuantizationScheme
from headrace.models.quantized_layout import group_tensors, is_in_order
from headrace.models.tensor_info import TensorInfo
from headrace.models.weights import open_weights

AWQ = {"m.qweight": ("i32", (64, 3)), "m.qzeros": ("i32", (4, 3)), "m.scales": ("f16", (4, 24))}
GPTQ = {"m.qweight": ("i32", (8, 24)), "m.qzeros": ("i32", (4, 3)), "m.scales": ("f16", (4, 24)), "m.g_idx": ("i32", (64,))}
PACKED = {"m.weight_packed": ("i32", (24, 8)), "m.weight_scale": ("bf16", (24, 4)), "m.weight_shape": ("i64", (2,))}
INT8 = {"m.weight": ("i8", (24, 64)), "m.weight_scale": ("f32", (24, 1))}
FP8 = {"m.weight": ("f8_e4m3", (24, 64)), "m.weight_scale_inv": ("f32", (2, 3))}

SCHEMES = {
    "awq": QuantizationScheme("awq", bits=4),
    "gptq": QuantizationScheme("gptq", bits=4, zero_offset=1),
    "compressed": QuantizationScheme("compressed-tensors"),
    "fp8": QuantizationScheme("fp8", block_shape=(16, 24)),
}


def group(stored, scheme, shape=(24, 64)):
    tensors = {name: TensorInfo(name, dims, dtype) for name, (dtype, dims) in stored.items()}
    return group_tensors(tensors, SCHEMES[scheme] if scheme else None, lambda name: np.array(shape))


@pytest.mark.parametrize(
    ("stored", "scheme", "dtype_name"),
    [
        (AWQ, "awq", "awq_int4"),
        (GPTQ, "gptq", "gptq_int4"),
        (PACKED, "compressed", "int4"),
        (INT8, "compressed", "int8"),
        (FP8, "fp8", "f8_e4m3"),
    ],
)
def test_parts_are_one_matrix(stored, scheme, dtype_name):
    matrices, used = group(stored | {"m.bias": ("f16", (24,)), "m.input_scale": ("f32", ())}, scheme)
    assert list(matrices) == ["m.weight"]
    assert (matrices["m.weight"].shape, matrices["m.weight"].dtype_name) == ((24, 64), dtype_name)
    assert used == {*stored, "m.input_scale"}


LIES = {
    "awq without scales": (AWQ, "awq", {"m.scales": None}, "m.scales is missing"),
    "awq scales of other outputs": (AWQ, "awq", {"m.scales": ("f16", (4, 32))}, "scales of 24 outputs"),
    "awq groups that do not divide": (AWQ, "awq", {"m.scales": ("f16", (5, 24))}, "5 groups do not divide 64"),
    "awq zero points of other groups": (AWQ, "awq", {"m.qzeros": ("i32", (5, 3))}, r"i32 \[4, 3\] is expected"),
    "awq codes of no words": (AWQ, "awq", {"m.qweight": ("i8", (64, 24))}, "not i32 of two dimensions"),
    "awq scales of integers": (AWQ, "awq", {"m.scales": ("i32", (4, 24))}, "it is i32"),
    "gptq order of other inputs": (GPTQ, "gptq", {"m.g_idx": ("i32", (1 << 40,))}, r"i32 or i64 \[64\] is expected"),
    "gptq groups that do not divide": (
        GPTQ, "gptq", {"m.g_idx": None, "m.scales": ("f16", (5, 24)), "m.qzeros": ("i32", (5, 3))}, "5 groups do not",
    ),
    "gptq outputs that fill no words": (
        GPTQ, "gptq", {"m.qweight": ("i32", (8, 25)), "m.scales": ("f16", (4, 25))}, "25 outputs of 4 bits",
    ),
    "packed zero points": (PACKED, "compressed", {"m.weight_zero_point": ("i32", (24, 4))}, r"\[3, 4\] is expected"),
    "int8 zero points": (INT8, "compressed", {"m.weight_zero_point": ("i8", (24, 4))}, r"\[24, 1\] is expected"),
    "int8 of three dimensions": (INT8, "compressed", {"m.weight": ("i8", (2, 24, 64))}, "two dimensions"),
    "int8 without rows": (INT8, "compressed", {"m.weight": ("i8", (0, 64))}, "two dimensions"),
    "int8 groups that do not divide": (INT8, "compressed", {"m.weight_scale": ("f32", (24, 5))}, "5 groups do not divide 64"),
    "fp8 without scales": (FP8, "fp8", {"m.weight_scale_inv": None}, "m.weight_scale is missing"),
    "fp8 blocks of another size": (FP8, "fp8", {"m.weight_scale_inv": ("f32", (3, 3))}, "one for 16 rows of 24"),
    "fp8 scales of integers": (FP8, "fp8", {"m.weight_scale_inv": ("i32", (2, 3))}, "not floating-point scales"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_parts_that_contradict_one_another_are_refused(case):
    stored, scheme, changes, message = LIES[case]
    changed = {name: value for name, value in (stored | changes).items() if value is not None}
    with pytest.raises(ModelError, match=message) as caught:
        group(changed, scheme)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(24, 1 << 40), (1 << 40, 64), (24, 0), (24, -64), (24, 65)])
def test_a_shape_that_its_words_do_not_hold_is_refused(shape):
    with pytest.raises(ModelError, match="is not the shape of"):
        group(PACKED, "compressed", shape)


def test_quantised_tensors_without_a_scheme_are_refused():
    for stored in (AWQ, GPTQ, PACKED, FP8):
        with pytest.raises(ModelError, match="has no quantization_config"):
            group(stored, None)


def test_directory_shows_matrices_as_the_model_names_them(tmp_path):
    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kinds = {"i32": np.int32, "f16": np.float16}
    save_file({name: np.zeros(shape, kinds[dtype]) for name, (dtype, shape) in AWQ.items()}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert weights.names() == ["m.weight"]
    assert weights.info("m.weight") == TensorInfo("m.weight", (24, 64), "awq_int4")
    assert weights.stored_info("m.qweight").shape == (64, 3)
    config["quantization_config"]["bits"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{tmp_path}: quantization_config of config.json: bits is 2"):
        open_weights(tmp_path)


def test_order_of_inputs():
    assert is_in_order(np.arange(64) // 16, 4)
    assert not is_in_order(np.arange(64) // 16, 3)
    assert not is_in_order((np.arange(64) // 16)[::-1], 4)
