"""Goal: a quantised checkpoint stands for the numbers that its format says. Method: codes chosen here, packed one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headrace.errors import ModelError
from services.worker.quantization.quantized_matrix import QuantizedMatrix
from services.worker.weights import WeightLoader
from tests.unit.worker.quantization.joined import joined

NAME = "model.layers.0.mlp.down_proj"
NUM_OUT, NUM_IN, GROUP = 24, 64, 16
NUM_GROUPS = NUM_IN // GROUP
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Case:
    """A random matrix: codes `[out, in]`, scales and zero points `[out, groups]`."""

    def __init__(self, bits: int, *, seed: int = 1, num_in: int = NUM_IN) -> None:
        generator = np.random.default_rng(seed)
        self.bits = bits
        self.codes = generator.integers(0, 1 << bits, (NUM_OUT, num_in))
        self.zeros = generator.integers(1, 1 << bits, (NUM_OUT, num_in // GROUP))
        self.scales = generator.uniform(1e-3, 1e-1, (NUM_OUT, num_in // GROUP)).astype(np.float16)

    def weights(self, groups: np.ndarray | None = None) -> np.ndarray:
        groups = np.arange(self.codes.shape[1]) // GROUP if groups is None else groups
        return self.scales.astype(np.float64)[:, groups] * (self.codes - self.zeros[:, groups])


def words_of(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack codes along an axis into int32 words: the code `order[i]` of a word stands in its bits `bits * i` and up."""
    per_word = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_word), dtype=np.uint32)
    for index in range(per_word):
        words |= codes[..., (order[index] if order else index) :: per_word] << np.uint32(bits * index)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def awq(case: Case) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors = {
        f"{NAME}.qweight": words_of(case.codes.T, 4, 1, AWQ_ORDER),
        f"{NAME}.qzeros": words_of(case.zeros.T, 4, 1, AWQ_ORDER),
        f"{NAME}.scales": torch.from_numpy(case.scales.T.copy()),
    }
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, tensors


def gptq(case: Case, *, version: int = 1, groups: np.ndarray | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    stored_zeros = case.zeros - 1 if version == 1 else case.zeros
    groups = np.arange(NUM_IN) // GROUP if groups is None else groups
    tensors = {
        f"{NAME}.qweight": words_of(case.codes.T, case.bits, 0),
        f"{NAME}.qzeros": words_of(stored_zeros.T, case.bits, 1),
        f"{NAME}.scales": torch.from_numpy(case.scales.T.copy()),
        f"{NAME}.g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    config = {"quant_method": "gptq", "bits": case.bits, "group_size": GROUP, "desc_act": True}
    return config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), tensors


def compressed(stored_format: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 8, **weights}, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": stored_format, "config_groups": groups, "ignore": ["lm_head"]}


def packed(case: Case, *, zeros: str = "none") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if zeros == "none":
        case.zeros = np.full_like(case.zeros, 1 << (case.bits - 1))
    tensors = {
        f"{NAME}.weight_packed": words_of(case.codes, case.bits, 1),
        f"{NAME}.weight_scale": torch.from_numpy(case.scales),
        f"{NAME}.weight_shape": torch.tensor(case.codes.shape),
    }
    if zeros == "packed":
        tensors[f"{NAME}.weight_zero_point"] = words_of(case.zeros, case.bits, 0)
    elif zeros == "plain":
        tensors[f"{NAME}.weight_zero_point"] = torch.from_numpy((case.zeros - (1 << (case.bits - 1))).astype(np.int8))
    return compressed("pack-quantized", {"num_bits": case.bits, "strategy": "group", "group_size": GROUP}), tensors


def write(directory: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Path:
    (directory / "config.json").write_text(json.dumps({"quantization_config": config} if config is not None else {}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def open_loader(directory: Path, made: tuple[dict[str, Any] | None, dict[str, torch.Tensor]], **options: Any) -> WeightLoader:
    return WeightLoader(write(directory, *made), **({"dtype": torch.float32} | options))


def taken(loader: WeightLoader) -> QuantizedMatrix:
    """The matrix, joined from its runs of rows."""
    runs = loader.take_quantized(f"{NAME}.weight", (NUM_OUT, NUM_IN), multiple=8)
    assert runs is not None
    return joined(runs)


INTEGER_CASES: dict[str, Callable[[], tuple[Case, tuple[dict[str, Any], dict[str, torch.Tensor]]]]] = {
    "awq": lambda: (case := Case(4), awq(case)),
    "gptq": lambda: (case := Case(4), gptq(case)),
    "gptq of 8 bits": lambda: (case := Case(8), gptq(case)),
    "gptq v2": lambda: (case := Case(4), gptq(case, version=2)),
    "packed": lambda: (case := Case(4), packed(case)),
    "packed of 8 bits": lambda: (case := Case(8), packed(case)),
    "packed with zero points": lambda: (case := Case(4), packed(case, zeros="packed")),
    "packed with plain zero points": lambda: (case := Case(4), packed(case, zeros="plain")),
}


@pytest.mark.parametrize("kind", INTEGER_CASES)
def test_integer_codes_come_in_the_common_form_and_as_numbers(kind: str, tmp_path: Path) -> None:
    case, made = INTEGER_CASES[kind]()
    matrix = taken(open_loader(tmp_path, made))
    assert np.array_equal(matrix.codes, case.codes)
    assert (matrix.bits, matrix.group_size, matrix.scales.dtype) == (case.bits, GROUP, np.float16)
    assert (matrix.zero is None) == (len(set(case.zeros.flat)) > 1)
    expected = case.weights().astype(np.float32)
    assert np.array_equal(matrix.dequantize(), expected)
    for dtype in (torch.float32, torch.bfloat16):
        loader = open_loader(tmp_path, made, dtype=dtype)
        assert torch.equal(loader.take(f"{NAME}.weight", (NUM_OUT, NUM_IN)), torch.from_numpy(expected).to(dtype))
        loader.check_all_taken()


def test_zero_points_that_are_all_alike_are_one(tmp_path: Path) -> None:
    case = Case(4)
    case.zeros = np.full_like(case.zeros, 8)
    matrix = taken(open_loader(tmp_path, gptq(case)))
    assert (matrix.zero, matrix.minimums) == (8, None)


def test_a_zero_point_of_zero_wraps_in_the_first_gptq_format(tmp_path: Path) -> None:
    case = Case(4)
    config, tensors = gptq(case)
    stored = case.zeros - 1
    stored[0, 0], case.zeros[0, 0] = 15, 0
    tensors[f"{NAME}.qzeros"] = words_of(stored.T, 4, 1)
    loaded = open_loader(tmp_path, (config, tensors)).take(f"{NAME}.weight", (NUM_OUT, NUM_IN))
    assert np.array_equal(loaded.numpy(), case.weights().astype(np.float32))


def test_gptq_without_an_order_has_its_groups_in_order(tmp_path: Path) -> None:
    case = Case(4)
    config, tensors = gptq(case)
    del tensors[f"{NAME}.g_idx"]
    loaded = open_loader(tmp_path, (config, tensors)).take(f"{NAME}.weight", (NUM_OUT, NUM_IN))
    assert np.array_equal(loaded.numpy(), case.weights().astype(np.float32))


def test_biases_of_zeros_that_a_gptq_checkpoint_has_beside_every_matrix_are_left(tmp_path: Path) -> None:
    """AutoGPTQ once wrote one for each matrix, whether the model has biases or not."""
    told: list[tuple[int, int]] = []
    config, tensors = gptq(Case(8))
    tensors[f"{NAME}.bias"] = torch.zeros(NUM_OUT, dtype=torch.float16)
    loader = open_loader(tmp_path, (config, tensors), on_progress=lambda done, of: told.append((done, of)))
    taken(loader)
    loader.check_all_taken()
    assert sum(num_values for num_values, _ in told) == told[-1][1]


@pytest.mark.parametrize(
    ("made", "name", "value"),
    [
        (lambda: gptq(Case(4)), f"{NAME}.bias", 0.5),
        (lambda: gptq(Case(4)), f"{NAME}.bias", float("nan")),
        (lambda: gptq(Case(4)), "model.layers.0.mlp.bias", 0.0),
        (lambda: gptq(Case(4)), f"{NAME}.shift", 0.0),
        (lambda: packed(Case(4)), f"{NAME}.bias", 0.0),
    ],
    ids=["a half", "no number", "of no matrix", "no bias", "of another layout"],
)
def test_other_tensors_that_no_model_asks_for_are_refused(
    made: Callable[[], tuple[dict[str, Any], dict[str, torch.Tensor]]], name: str, value: float, tmp_path: Path
) -> None:
    config, tensors = made()
    tensors[name] = torch.zeros(NUM_OUT, dtype=torch.float16)
    tensors[name][3] = value
    loader = open_loader(tmp_path, (config, tensors))
    taken(loader)
    with pytest.raises(ModelError, match=rf"describes a model without the tensors {re.escape(name)} \[24\]"):
        loader.check_all_taken()


@pytest.mark.parametrize("layout", ["gptq", "packed"])
def test_inputs_spread_over_the_groups_are_given_as_numbers_only(layout: str, tmp_path: Path) -> None:
    # Act-order: groups are of inputs by their importance; here two of them are of unequal size as well.
    groups = np.random.default_rng(2).permutation(np.arange(NUM_IN) // GROUP)
    groups[groups == 3] = np.where(np.arange(GROUP) % 2, 3, 0)
    case = Case(4)
    if layout == "gptq":
        made = gptq(case, groups=groups)
    else:
        made = packed(case, zeros="packed")
        made[1][f"{NAME}.weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    loader = open_loader(tmp_path, made)
    assert loader.take_quantized(f"{NAME}.weight", (NUM_OUT, NUM_IN), multiple=8) is None
    assert np.array_equal(loader.take(f"{NAME}.weight", (NUM_OUT, NUM_IN)).numpy(), case.weights(groups).astype(np.float32))
    assert loader.unpacked == {f"{NAME}.weight": "its groups are not of neighbours (act-order)"}


def test_an_order_of_minus_one_is_none(tmp_path: Path) -> None:
    case = Case(4)
    config, tensors = packed(case)
    tensors[f"{NAME}.weight_g_idx"] = torch.full((NUM_IN,), -1, dtype=torch.int32)
    matrix = taken(open_loader(tmp_path, (config, tensors)))
    assert np.array_equal(matrix.dequantize(), case.weights().astype(np.float32))


def test_packed_rows_need_not_fill_their_last_word(tmp_path: Path) -> None:
    case = Case(4, num_in=NUM_IN)
    case.codes, case.scales, case.zeros = case.codes[:, :60], case.scales[:, :1].copy(), case.zeros[:, :1]
    loaded = open_loader(tmp_path, packed(case)).take(f"{NAME}.weight", (NUM_OUT, 60))
    assert np.array_equal(loaded.numpy(), case.weights(np.zeros(60, dtype=int)).astype(np.float32))


@pytest.mark.parametrize("scales", ["rows", "flat rows", "tensor", "groups"])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_int8_weights(scales: str, has_zeros: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    shape = {"rows": (NUM_OUT, 1), "flat rows": (NUM_OUT,), "tensor": (1,), "groups": (NUM_OUT, NUM_GROUPS)}[scales]
    codes = generator.integers(-128, 128, (NUM_OUT, NUM_IN)).astype(np.int8)
    factors = torch.from_numpy(generator.uniform(1e-3, 1e-1, shape)).to(torch.bfloat16)
    zeros = generator.integers(-128, 128, shape).astype(np.int8) if has_zeros else np.zeros(shape, np.int8)
    tensors = {f"{NAME}.weight": torch.from_numpy(codes), f"{NAME}.weight_scale": factors}
    if has_zeros:
        tensors[f"{NAME}.weight_zero_point"] = torch.from_numpy(zeros)
    # Static quantisation of activations leaves scales that weights do not need.
    tensors[f"{NAME}.input_scale"] = torch.tensor([0.5])
    made = (compressed("int-quantized", {"strategy": "channel"}), tensors)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, GROUP, axis=1) if scales == "groups" else values.reshape(-1, 1)

    expected = (spread(factors.double().numpy()) * (codes - spread(zeros.astype(np.float64)))).astype(np.float32)
    loader = open_loader(tmp_path, made)
    assert np.array_equal(loader.take(f"{NAME}.weight", (NUM_OUT, NUM_IN)).numpy(), expected)
    loader.check_all_taken()
    matrix = taken(open_loader(tmp_path, made))
    assert matrix.group_size == (GROUP if scales == "groups" else NUM_IN)
    np.testing.assert_allclose(matrix.dequantize(), expected, rtol=1e-5, atol=1e-5)


FP8_CONFIGS = {
    "tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "scalar": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "rows": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
    "blocks": {"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"},
    "compressed rows": compressed("float-quantized", {"type": "float", "strategy": "channel"}),
    "compressed blocks": compressed("float-quantized", {"type": "float", "strategy": "block", "block_structure": [16, 24]}),
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", FP8_CONFIGS)
def test_eight_bit_floats_are_given_as_numbers(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # Blocks of 16 x 24 do not divide the matrix of 24 x 64: the last ones are smaller.
    generator = torch.Generator().manual_seed(4)
    codes = torch.randn(NUM_OUT, NUM_IN, generator=generator).to(dtype)
    shape = {"tensor": (1,), "scalar": (), "rows": (NUM_OUT, 1), "blocks": (2, 3)}[kind.rsplit(maxsplit=1)[-1]]
    scales = torch.rand(shape, generator=generator) + 0.5
    suffix = "weight_scale_inv" if kind == "blocks" else "weight_scale"
    tensors = {f"{NAME}.weight": codes, f"{NAME}.{suffix}": scales, f"{NAME}.input_scale": torch.tensor(1.0)}
    by_block = shape == (2, 3)
    spread = scales.repeat_interleave(16, 0)[:NUM_OUT].repeat_interleave(24, 1)[:, :NUM_IN] if by_block else scales
    for wanted in (torch.float32, torch.bfloat16):
        loader = open_loader(tmp_path, (FP8_CONFIGS[kind], tensors), dtype=wanted)
        assert loader.take_quantized(f"{NAME}.weight", (NUM_OUT, NUM_IN), multiple=8) is None
        assert torch.equal(loader.take(f"{NAME}.weight", (NUM_OUT, NUM_IN)), (codes.float() * spread).to(wanted))
        loader.check_all_taken()


@pytest.mark.parametrize("kind", FP8_CONFIGS)
def test_eight_bit_floats_are_given_as_their_bits_to_a_backend_that_asks(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randn(NUM_OUT, NUM_IN, generator=generator).to(torch.float8_e4m3fn)
    shape = {"tensor": (1,), "scalar": (), "rows": (NUM_OUT, 1), "blocks": (2, 3)}[kind.rsplit(maxsplit=1)[-1]]
    suffix = "weight_scale_inv" if kind == "blocks" else "weight_scale"
    tensors = {f"{NAME}.weight": codes, f"{NAME}.{suffix}": torch.rand(shape, generator=generator) + 0.5}
    loader = open_loader(tmp_path, (FP8_CONFIGS[kind], tensors))
    numbers = loader.take(f"{NAME}.weight", (NUM_OUT, NUM_IN))
    loader = open_loader(tmp_path, (FP8_CONFIGS[kind], tensors))
    assert loader.is_quantized(f"{NAME}.weight")
    runs = loader.take_float8(f"{NAME}.weight", (NUM_OUT, NUM_IN), multiple=8)
    assert runs is not None
    by_run = list(runs)
    # Blocks are not cut.
    assert [len(run.codes) for run in by_run] == ([16, 8] if shape == (2, 3) else [8, 8, 8])
    found = []
    for run in by_run:
        scales = np.repeat(np.repeat(run.scales, run.block_rows, axis=0), run.block_columns, axis=1)[: len(run.codes), :NUM_IN]
        found.append(torch.from_numpy(run.codes).view(torch.float8_e4m3fn).float() * torch.from_numpy(scales))
        assert run.input_type == ("float8" if kind in ("tensor", "blocks") else "")
    assert torch.equal(torch.cat(found), numbers)
    assert loader.num_bytes == sum(run.num_bytes for run in by_run)
    loader.check_all_taken()


def test_eight_bit_floats_of_another_type_are_numbers_with_the_reason(tmp_path: Path) -> None:
    codes = torch.ones(NUM_OUT, NUM_IN).to(torch.float8_e5m2)
    tensors = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": torch.tensor(1.0)}
    loader = open_loader(tmp_path, (FP8_CONFIGS["tensor"], tensors))
    assert loader.take_float8(f"{NAME}.weight", (NUM_OUT, NUM_IN), multiple=8) is None
    assert loader.unpacked == {f"{NAME}.weight": "eight-bit floats of type e5m2"}
    assert loader.take(f"{NAME}.weight", (NUM_OUT, NUM_IN)).eq(1).all()


def test_what_inputs_were_quantised_to_goes_with_the_codes(tmp_path: Path) -> None:
    config, tensors = packed(Case(4))
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    assert not open_loader(tmp_path, (None, {"a": torch.ones(2, 2)})).is_quantized("a")
    loader = open_loader(tmp_path, (config, tensors))
    assert not loader.is_quantized("not there")
    runs = loader.take_quantized(f"{NAME}.weight", (NUM_OUT, NUM_IN), multiple=8)
    assert runs is not None
    assert {run.input_type for run in runs} == {"int8"}


def test_eight_bit_floats_without_a_scheme_are_numbers(tmp_path: Path) -> None:
    codes = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)).to(torch.float8_e4m3fn)
    loaded = open_loader(tmp_path, (None, {"a.weight": codes})).take("a.weight", (4, 8))
    assert torch.equal(loaded, codes.float())


def test_modules_that_are_left_out_are_plain(tmp_path: Path) -> None:
    for kind, (config, tensors) in {"awq": awq(Case(4)), "gptq": gptq(Case(4)), "packed": packed(Case(4))}.items():
        head = torch.randn(8, 6, generator=torch.Generator().manual_seed(6)).to(torch.float16)
        loader = open_loader(
            tmp_path,
            (
                config | {"modules_to_not_convert": ["lm_head"]},
                tensors | {"lm_head.weight": head, f"{NAME}.bias": torch.ones(NUM_OUT)},
            ),
        )
        assert loader.take_quantized("lm_head.weight", (8, 6), multiple=8) is None, kind
        stacked = loader.take_stacked([("lm_head.weight", (8, 6))])
        assert torch.equal(stacked, head.float())
        assert loader.take(f"{NAME}.bias", (NUM_OUT,)).tolist() == [1.0] * NUM_OUT
        assert loader.take_quantized(f"{NAME}.weight", (NUM_OUT, NUM_IN), multiple=8) is not None
        loader.check_all_taken()


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    groups = np.arange(NUM_IN) // GROUP
    groups[5] = 9
    loader = open_loader(tmp_path, gptq(Case(4), groups=groups))
    with pytest.raises(ModelError, match=r"g_idx names group 9, but there are 4"):
        loader.take(f"{NAME}.weight", (NUM_OUT, NUM_IN))
