"""`quantized_matmul` against its reference: 4-bit, int8 and FP8 weights, and the quantising of activations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kernels.launching import KernelArgumentError, LaunchConfig
from kernels.quantized_matmul import launch, reference
from kernels.quantized_matmul.launch import Tiles
from kernels.quantized_matmul.reference import W4Weight, W8Weight
from tests.kernels.comparing import BOUNDS, FLOATS, assert_matches, lazy_zeros, normal, poisoned, strided

CONFIG = LaunchConfig(num_warps=4)
SMALL = Tiles(16, 16, 16, CONFIG)
"""Tiles so small that small sizes take several, the last of each kind partly filled."""

SMALL_OF_BYTES = Tiles(16, 16, 32, CONFIG)
"""Likewise for int8: NVIDIA's matrix units take 32 inputs of a byte at least."""

FP8_SUM_ERROR = 2.0**-11
"""Bound of a relative error where Hopper's wgmma sums e4m3fn: it keeps 13 bits behind the point of the largest of 32 terms.
1.0e-4 were measured over 300 inputs. mma.sync keeps more, and the type's own bound.
"""

LAYOUTS = ("gptq", "awq")


def w4_weight(
    num_inputs: int,
    num_outputs: int,
    layout: reference.Layout,
    *,
    group_size: int = 16,
    dtype: torch.dtype = torch.float32,
    zero_offset: int = 0,
) -> W4Weight:
    num_groups = -(-num_inputs // group_size)
    values, zeros = torch.randint(0, 16, (num_inputs, num_outputs)), torch.randint(0, 16, (num_groups, num_outputs))
    # The zero point that wraps when it is stored less 1.
    zeros[0, 0] = 0
    qweight, qzeros = reference.pack_w4(values, zeros, layout, zero_offset=zero_offset)
    scales = (torch.rand(num_groups, num_outputs) + 0.5).to(dtype)
    return W4Weight(qweight, scales, layout, group_size, qzeros, zero_offset=zero_offset)


# The layouts


def test_words_hold_numbers_where_the_formats_say() -> None:
    """Goal: the layouts of real checkpoints, not of our own packing. Method: words written out by hand."""
    in_order = reference.pack_words(torch.arange(8)[None], reference.GPTQ_ORDER)
    assert in_order.tolist() == [[0x76543210]]
    # AutoAWQ: the lowest four bits hold column 0, then 2, 4, 6, 1, 3, 5, 7.
    interleaved = reference.pack_words(torch.arange(8)[None], reference.AWQ_ORDER)
    assert interleaved.tolist() == [[0x75316420]]
    negative = reference.pack_words(torch.full((1, 8), 15), reference.GPTQ_ORDER)
    assert negative.tolist() == [[-1]]


@pytest.mark.parametrize("order", [reference.GPTQ_ORDER, reference.AWQ_ORDER], ids=LAYOUTS)
def test_packing_loses_nothing(order: tuple[int, ...]) -> None:
    values = torch.randint(0, 16, (5, 24))
    assert torch.equal(reference.unpack_words(reference.pack_words(values, order), order), values)


def test_a_gptq_matrix_is_packed_along_its_inputs_and_an_awq_one_along_its_outputs() -> None:
    values, zeros = torch.zeros(16, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)
    values[9, 3], zeros[0, 2] = 5, 1
    qweight, qzeros = reference.pack_w4(values, zeros, "gptq", zero_offset=1)
    assert qweight[1, 3] == 5 << 4
    # Each stored zero point is 1 less, and 0 wraps to 15.
    assert qzeros[0, 0].item() & 0xFFFFFFFF == 0xFFFFF0FF
    qweight, qzeros = reference.pack_w4(values, zeros, "awq")
    assert qweight[9, 0] == 5 << 20
    assert qzeros[0, 0] == 1 << 4


# 4-bit weights


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs", "group_size"),
    [(1, 16, 8, 16), (17, 40, 24, 16), (5, 96, 40, 48), (3, 56, 16, 1000)],
    ids=["one-word", "short-last-group", "groups-of-steps", "one-group"],
)
def test_4_bit_weights(
    num_tokens: int, num_inputs: int, num_outputs: int, group_size: int, layout: reference.Layout, dtype: torch.dtype
) -> None:
    x, bias = normal(num_tokens, num_inputs, dtype=dtype), normal(num_outputs, dtype=dtype)
    weight = w4_weight(num_inputs, num_outputs, layout, group_size=group_size, dtype=dtype)
    out = launch.matmul_w4a16(x, weight, bias=bias, tiles=SMALL)
    assert_matches(out, reference.matmul_w4a16(x, weight, bias).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_4_bit_weights_in_the_default_tiles(dtype: torch.dtype, layout: reference.Layout) -> None:
    x, weight = normal(33, 160, dtype=dtype), w4_weight(160, 72, layout, group_size=32, dtype=dtype)
    wanted = reference.matmul_w4a16(x, weight).to(dtype)
    assert_matches(launch.matmul_w4a16(x, weight), wanted)
    prefill = launch.weight_only_tiles_of(launch.architecture_of(x.device), dtype, 32, is_prefill=True)
    assert_matches(launch.matmul_w4a16(x, weight, tiles=prefill), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_points_may_be_absent_or_stored_less_1(layout: reference.Layout) -> None:
    x = normal(3, 32)
    for weight in (
        w4_weight(32, 16, layout, zero_offset=1),
        dataclasses.replace(w4_weight(32, 16, layout), qzeros=None),
    ):
        out = launch.matmul_w4a16(x, weight, tiles=SMALL)
        assert_matches(out, reference.matmul_w4a16(x, weight))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_may_name_their_groups(layout: reference.Layout, dtype: torch.dtype) -> None:
    """GPTQ's act-order: weights are scaled and rounded before the product, so one rounding more."""
    index = torch.randint(0, 3, (40,), dtype=torch.int32)
    x, weight = normal(3, 40, dtype=dtype), dataclasses.replace(w4_weight(40, 24, layout, dtype=dtype), group_index=index)
    wanted = reference.matmul_w4a16(x, weight).to(dtype)
    assert_matches(launch.matmul_w4a16(x, weight, tiles=SMALL), wanted, bound=2 * BOUNDS[dtype])
    weight = dataclasses.replace(weight, qzeros=None)
    wanted = reference.matmul_w4a16(x, weight).to(dtype)
    assert_matches(launch.matmul_w4a16(x, weight, tiles=SMALL), wanted, bound=2 * BOUNDS[dtype])


def test_4_bit_rows_may_be_strided_and_gaps_stay_as_they_were() -> None:
    x, weight = normal(4, 32), w4_weight(32, 16, "awq")
    gaps = dataclasses.replace(
        weight, qweight=strided(weight.qweight), scales=strided(weight.scales), qzeros=strided(weight.qzeros)
    )
    out = strided(poisoned(4, 16, dtype=torch.float32))
    launch.matmul_w4a16(strided(x), gaps, out=out, tiles=SMALL)
    assert_matches(out, reference.matmul_w4a16(x, weight))
    assert out.as_strided((3, 3), (19, 1), 16).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_4_bit_groups_may_have_minimums(layout: reference.Layout, dtype: torch.dtype) -> None:
    """GGUF's Q4_1 and Q4_K: code 0 stands for a number that is no multiple of the scale. Scales may be of another type than x."""
    x, bias = normal(17, 72, dtype=dtype), normal(24, dtype=dtype)
    weight = w4_weight(72, 24, layout, dtype=torch.float16)
    weight = dataclasses.replace(weight, qzeros=None, minimums=strided(-normal(5, 24).abs() * 8))
    out = launch.matmul_w4a16(x, weight, bias=bias, tiles=SMALL)
    assert_matches(out, reference.matmul_w4a16(x, weight, bias).to(dtype))
    assert_matches(launch.matmul_w4a16(x, weight), reference.matmul_w4a16(x, weight).to(dtype))


# Weights of a byte


def w8_weight(num_inputs: int, num_outputs: int, *, group_size: int = 16, kind: str = "zero") -> W8Weight:
    shape = (-(-num_inputs // group_size), num_outputs)
    codes, scales = torch.randint(0, 256, (num_outputs, num_inputs), dtype=torch.uint8), torch.rand(shape) + 0.5
    if kind == "float8":
        codes = normal(num_outputs, num_inputs, scale=100).to(torch.float8_e4m3fn).view(torch.uint8)
        return W8Weight(codes, scales, group_size, is_float8=True)
    if kind == "minimums":
        return W8Weight(codes, scales.half(), group_size, minimums=-normal(*shape).abs() * 128)
    return W8Weight(codes, scales.half(), group_size, zero=128)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["zero", "minimums", "float8"])
@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs", "group_size"),
    [(6, 16, 7, 16), (17, 45, 33, 16), (3, 51, 20, 1000)],
    ids=["one-step", "short-last-group", "one-group"],
)
def test_weights_of_bytes(
    num_tokens: int, num_inputs: int, num_outputs: int, group_size: int, kind: str, dtype: torch.dtype
) -> None:
    x, bias = normal(num_tokens, num_inputs, dtype=dtype), normal(num_outputs, dtype=dtype)
    weight = w8_weight(num_inputs, num_outputs, group_size=group_size, kind=kind)
    out = launch.matmul_w8a16(x, weight, bias=bias, tiles=SMALL)
    assert_matches(out, reference.matmul_w8a16(x, weight, bias).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_of_bytes_in_the_default_tiles(dtype: torch.dtype) -> None:
    x, weight = normal(33, 160, dtype=dtype), w8_weight(160, 70, group_size=32)
    assert_matches(launch.matmul_w8a16(x, weight), reference.matmul_w8a16(x, weight).to(dtype))


def test_rows_of_bytes_may_be_strided_and_gaps_stay_as_they_were() -> None:
    x, weight = normal(4, 32), w8_weight(32, 16, kind="minimums")
    assert weight.minimums is not None
    gaps = dataclasses.replace(
        weight, codes=strided(weight.codes), scales=strided(weight.scales), minimums=strided(weight.minimums)
    )
    out = strided(poisoned(4, 16, dtype=torch.float32))
    launch.matmul_w8a16(strided(x), gaps, out=out, tiles=SMALL)
    assert_matches(out, reference.matmul_w8a16(x, weight))
    assert out.as_strided((3, 3), (19, 1), 16).isnan().all()


# int8


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_inputs", "num_outputs"), [(1, 1, 1), (17, 45, 33), (4, 128, 16)])
def test_int8_sums_are_exact(num_tokens: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
    x = torch.randint(-128, 128, (num_tokens, num_inputs), dtype=torch.int8)
    weight = torch.randint(-128, 128, (num_outputs, num_inputs), dtype=torch.int8)
    scales, bias = (torch.rand(num_tokens), torch.rand(num_outputs) / 100), normal(num_outputs, scale=100)
    out = launch.matmul_int8(
        strided(x),
        scales[0],
        strided(weight),
        scales[1],
        out=poisoned(num_tokens, num_outputs, dtype=dtype),
        bias=bias,
        tiles=SMALL_OF_BYTES,
    )
    wanted = reference.matmul_int8(x, scales[0], weight, scales[1], bias)
    assert_matches(out, wanted.to(dtype))


def test_int8_in_the_default_tiles() -> None:
    x, weight = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 200), (140, 200)))
    ones = torch.ones(140)
    out = launch.matmul_int8(x, ones[:3], weight, ones, out=poisoned(3, 140, dtype=torch.float32))
    assert torch.equal(out, reference.matmul_int8(x, ones[:3], weight, ones))


def test_the_largest_int8_sum_fits() -> None:
    num_inputs = launch.INT8_INPUTS_MAX
    x, one = torch.full((1, num_inputs), -128, dtype=torch.int8), torch.ones(1)
    # Long steps, for the interpreter's sake; two tiles of 16 x 1024 bytes fit into any GPU's shared memory.
    out = launch.matmul_int8(x, one, x, one, out=poisoned(1, 1, dtype=torch.float32), tiles=Tiles(16, 16, 1024, CONFIG))
    assert out.item() == float(num_inputs * 128**2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 5000)])
def test_activations_become_int8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    out, scale = launch.quantize_int8(strided(x))
    wanted, wanted_scale = reference.quantize_int8(x)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(out, wanted)


def test_int8_codes_round_ties_to_even_and_zeros_stay_zeros() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], [0.0] * 7])
    out, scale = launch.quantize_int8(x)
    assert out.tolist() == [[127, 0, 2, 2, 0, -2, -126], [0] * 7]
    assert scale[0] == 1.0


# FP8


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "decoded"])
@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs", "dtype"),
    [(1, 16, 8, torch.float32), (17, 200, 150, torch.float32), (3, 256, 130, torch.bfloat16), (3, 129, 20, torch.float16)],
    ids=["one-block", "odd", "bfloat16", "float16"],
)
def test_fp8_is_scaled_by_blocks(num_tokens: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, is_native: bool) -> None:
    x, x_scale = reference.quantize_fp8(normal(num_tokens, num_inputs))
    weight = normal(num_outputs, num_inputs, scale=100).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(-(-num_outputs // 128), -(-num_inputs // 128)) + 0.5
    bias = normal(num_outputs, scale=100)
    tiles = Tiles(16, 32, 64, CONFIG, is_native)
    out = launch.matmul_fp8(
        strided(x), x_scale.T.contiguous().T, strided(weight), weight_scale,
        out=poisoned(num_tokens, num_outputs, dtype=dtype), bias=bias, tiles=tiles,
    )  # fmt: skip
    assert_matches(out, reference.matmul_fp8(x, x_scale, weight, weight_scale, bias).to(dtype))


def test_fp8_in_the_default_tiles() -> None:
    x, x_scale = reference.quantize_fp8(normal(2, 300))
    weight, weight_scale = normal(200, 300).to(torch.float8_e4m3fn), torch.rand(2, 3)
    out = launch.matmul_fp8(x, x_scale, weight, weight_scale, out=poisoned(2, 200, dtype=torch.float32))
    wanted = reference.matmul_fp8(x, x_scale, weight, weight_scale)
    assert_matches(out, wanted, bound=None if out.device.type == "cpu" else FP8_SUM_ERROR)


def test_every_fp8_number_is_decoded_exactly() -> None:
    """Goal: all 256 codes. Method: each finite one alone on the diagonal, times 1; then the two NaN, which would spoil the sums."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn)
    diagonal = torch.zeros(256, 256, dtype=torch.uint8)
    finite = ~numbers.float().isnan()
    diagonal[finite, finite] = codes[finite]
    x, one = torch.ones(1, 256).to(torch.float8_e4m3fn), torch.ones(2, 2)
    tiles = Tiles(16, 128, 128, CONFIG, is_native=False)
    weight = diagonal.view(torch.float8_e4m3fn)
    out = launch.matmul_fp8(x, one[:1], weight, one, out=poisoned(1, 256, dtype=torch.float32), tiles=tiles)
    assert torch.equal(out[0, finite], numbers.float()[finite])
    for code in (0x7F, 0xFF):
        weight = torch.full((1, 1), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        out = launch.matmul_fp8(
            x[:, :1], one[:1, :1], weight, one[:1, :1], out=poisoned(1, 1, dtype=torch.float32).zero_(), tiles=tiles
        )
        assert out.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (19, 77), (3, 300)])
def test_activations_become_fp8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    x[0] = x[0] * torch.logspace(-6, 0, shape[1]).to(dtype)
    out, scale = launch.quantize_fp8(strided(x))
    wanted, wanted_scale = reference.quantize_fp8(x)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8))


def test_fp8_rounds_as_torch_does_at_every_border() -> None:
    """Goal: each decision. Method: every finite number, the middle between it and the next, and both sides of the middle."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    inputs = torch.cat([numbers, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    inputs = torch.cat([inputs, -inputs])
    # With 448 in every group, the scale is 1.
    rows = torch.cat([torch.full((len(inputs), 1), 448.0), inputs[:, None]], dim=1)
    out, scale = launch.quantize_fp8(rows)
    assert (scale == 1.0).all()
    assert torch.equal(out[:, 1].float(), inputs.to(torch.float8_e4m3fn).float())


# All


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x = normal(20, 64, dtype=torch.bfloat16)
    weight = w4_weight(64, 16, "awq", dtype=torch.bfloat16)
    codes, scale = launch.quantize_fp8(x)
    eight, ones = normal(16, 64).to(torch.float8_e4m3fn), torch.ones(1, 1)
    out = poisoned(20, 16, dtype=torch.bfloat16)
    together, in_fp8 = launch.matmul_w4a16(x, weight, tiles=SMALL), launch.matmul_fp8(codes, scale, eight, ones, out=out)
    by_bytes = w8_weight(64, 16)
    in_bytes = launch.matmul_w8a16(x, by_bytes, tiles=SMALL)
    for row in (slice(0, 1), slice(19, 20)):
        assert torch.equal(launch.matmul_w8a16(x[row], by_bytes, tiles=SMALL), in_bytes[row])
        assert torch.equal(launch.matmul_w4a16(x[row], weight, tiles=SMALL), together[row])
        alone = launch.matmul_fp8(codes[row], scale[row], eight, ones, out=poisoned(1, 16, dtype=torch.bfloat16))
        assert torch.equal(alone, in_fp8[row])


def test_an_empty_batch_is_an_empty_result() -> None:
    assert launch.matmul_w4a16(normal(0, 32), w4_weight(32, 16, "gptq")).shape == (0, 16)
    assert launch.matmul_w8a16(normal(0, 32), w8_weight(32, 16)).shape == (0, 16)
    codes, scale = launch.quantize_int8(normal(0, 32))
    out = launch.matmul_int8(codes, scale, torch.zeros(8, 32, dtype=torch.int8), torch.ones(8), out=torch.empty(0, 8))
    assert out.shape == (0, 8)
    codes, scale = launch.quantize_fp8(normal(0, 32))
    weight = torch.zeros(8, 32).to(torch.float8_e4m3fn)
    assert launch.matmul_fp8(codes, scale, weight, torch.ones(1, 1), out=torch.empty(0, 8)).shape == (0, 8)


def test_offsets_reach_past_two_to_the_31() -> None:
    """Goal: no 32-bit product of a stride. Method: the last row lies 2^31 elements on, in memory never touched before."""
    far = lazy_zeros(9, 2**28 + 1, dtype=torch.int8)
    x, weight = (torch.randint(-128, 128, (9, 16), dtype=torch.int8) for _ in range(2))
    far[:, :16], far[:, 16:32] = x, weight
    ones = torch.ones(9)
    out = launch.matmul_int8(far[:, :16], ones, far[:, 16:32], ones, out=poisoned(9, 9, dtype=torch.float32), tiles=SMALL_OF_BYTES)
    assert torch.equal(out, reference.matmul_int8(x, ones, weight, ones))
    tiles = Tiles(16, 16, 16, CONFIG, is_native=False)
    eights = far.view(torch.float8_e4m3fn)
    out = launch.matmul_fp8(
        eights[:, :16], ones[:, None], eights[:, 16:32], torch.ones(1, 1), out=poisoned(9, 9, dtype=torch.float32), tiles=tiles
    )
    x8, weight8 = x.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
    wanted = reference.matmul_fp8(x8, ones[:, None], weight8, torch.ones(1, 1))
    assert torch.equal(out.isnan(), wanted.isnan())
    assert_matches(out.nan_to_num(), wanted.nan_to_num())


def test_offsets_of_bytes_reach_past_two_to_the_31() -> None:
    x, weight = normal(2, 16), w8_weight(16, 9)
    far = lazy_zeros(9, 2**28 + 1, dtype=torch.uint8)[:, :16]
    far.copy_(weight.codes)
    out = launch.matmul_w8a16(x, dataclasses.replace(weight, codes=far), tiles=SMALL)
    assert_matches(out, reference.matmul_w8a16(x, weight))


def test_4_bit_offsets_reach_past_two_to_the_31() -> None:
    x, weight = normal(2, 32), w4_weight(32, 16, "awq")
    far = lazy_zeros(32, 2**26 + 2**22, dtype=torch.int32)[:, :2]
    far.copy_(weight.qweight)
    out = launch.matmul_w4a16(x, dataclasses.replace(weight, qweight=far), tiles=SMALL)
    assert_matches(out, reference.matmul_w4a16(x, weight))


# Refusals


def test_wrong_4_bit_arguments_are_named() -> None:
    x, weight = normal(2, 32), w4_weight(32, 16, "gptq")
    for changes, message in (
        ({"qweight": weight.qweight.long()}, "qweight must have or be torch.int32, got torch.int64"),
        ({"qweight": weight.qweight[:3]}, r"qweight must have or be shape \(4, 16\), got shape \(3, 16\)"),
        ({"layout": "awq"}, r"qweight must have or be shape \(32, 2\), got shape \(4, 16\)"),
        ({"layout": "marlin"}, "layout must have or be gptq or awq, got marlin"),
        ({"group_size": 32}, "scales must have or be 1 groups of 32, got 2"),
        ({"group_size": 0}, "group_size must have or be positive, got 0"),
        ({"group_size": 24}, "group_size must have or be a multiple of 16, or all inputs, got 24"),
        ({"zero_offset": 2}, "zero_offset must have or be 0 or 1, got 2"),
        ({"qzeros": weight.qzeros[:1]}, r"qzeros must have or be shape \(2, 2\), got shape \(1, 2\)"),
        ({"scales": weight.scales[:, :12]}, "scales must have or be a multiple of 8 outputs, got 12"),
        ({"minimums": weight.scales}, "minimums must have or be None beside zero points or a group index, got both"),
        ({"minimums": weight.scales[:1], "qzeros": None}, r"minimums must have or be shape \(2, 16\), got shape \(1, 16\)"),
        ({"group_index": torch.zeros(8).int()}, r"group_index must have or be shape \(32\), got shape \(8,\)"),
    ):
        with pytest.raises(KernelArgumentError, match=f"matmul_w4a16: {message}"):
            launch.matmul_w4a16(x, dataclasses.replace(weight, **changes))
    for form, message in (
        ({"tiles": Tiles(16, 16, 32, CONFIG)}, "tiles must have or be block_k up to 16, got 32"),
        ({"out": torch.zeros(2, 16).half()}, "out must have or be torch.float32, got torch.float16"),
        ({"bias": torch.zeros(8)}, r"bias must have or be shape \(16\), got shape \(8,\)"),
    ):
        with pytest.raises(KernelArgumentError, match=f"matmul_w4a16: {message}"):
            launch.matmul_w4a16(x, weight, **form)


def test_wrong_arguments_of_weights_of_bytes_are_named() -> None:
    x, weight = normal(2, 32), w8_weight(32, 16)
    for changes, message in (
        ({"codes": weight.codes.char()}, "codes must have or be torch.uint8, got torch.int8"),
        ({"codes": weight.codes[:, :31]}, r"codes must have or be shape \(any, 32\), got shape \(16, 31\)"),
        ({"scales": weight.scales[:1]}, r"scales must have or be shape \(2, 16\), got shape \(1, 16\)"),
        ({"group_size": 0}, "group_size must have or be positive, got 0"),
        ({"group_size": 24}, "group_size must have or be a multiple of 16, or all inputs, got 24"),
        ({"zero": 256}, "zero must have or be 0 to 255, got 256"),
        ({"is_float8": True}, "zero must have or be 0 for e4m3fn and beside minimums, got 128"),
        ({"minimums": weight.scales}, "zero must have or be 0 for e4m3fn and beside minimums, got 128"),
        ({"minimums": weight.scales, "zero": 0, "is_float8": True}, "minimums must have or be None for e4m3fn, got a tensor"),
        ({"minimums": weight.scales[:1], "zero": 0}, r"minimums must have or be shape \(2, 16\), got shape \(1, 16\)"),
    ):
        with pytest.raises(KernelArgumentError, match=f"matmul_w8a16: {message}"):
            launch.matmul_w8a16(x, dataclasses.replace(weight, **changes))
    with pytest.raises(KernelArgumentError, match=r"out must have or be torch\.float32, got torch\.float16"):
        launch.matmul_w8a16(x, weight, out=torch.zeros(2, 16).half())


def test_wrong_8_bit_arguments_are_named() -> None:
    codes, out = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, 4)
    good: dict[str, Any] = {"x": codes, "x_scale": torch.ones(4), "weight": codes, "weight_scale": torch.ones(4), "out": out}
    for name, value, message in (
        ("x", codes.short(), "x must have or be torch.int8, got torch.int16"),
        ("x", torch.zeros(1, 200000, dtype=torch.int8), "x must have or be 1 to 131071 inputs, got 200000"),
        ("weight", codes[:, :7], r"weight must have or be shape \(any, 8\), got shape \(4, 7\)"),
        ("tiles", SMALL, "tiles must have or be block_k from 32, got 16"),
        ("x_scale", torch.ones(3), r"x_scale must have or be shape \(4\), got shape \(3,\)"),
        ("weight_scale", torch.ones(4).half(), "weight_scale must have or be torch.float32, got torch.float16"),
        ("out", out[:, :3], r"out must have or be shape \(4, 4\), got shape \(4, 3\)"),
    ):
        with pytest.raises(KernelArgumentError, match=f"matmul_int8: {message}"):
            launch.matmul_int8(**(good | {name: value}))
    numbers = torch.zeros(4, 130).to(torch.float8_e4m3fn)
    scales = torch.ones(4, 2)
    good = {"x": numbers, "x_scale": scales, "weight": numbers, "weight_scale": scales[:1], "out": out}
    for name, value, message in (
        ("x", numbers.float(), "x must have or be torch.float8_e4m3fn, got torch.float32"),
        ("x_scale", scales[:, :1], r"x_scale must have or be shape \(4, 2\), got shape \(4, 1\)"),
        ("weight_scale", scales, r"weight_scale must have or be shape \(1, 2\), got shape \(4, 2\)"),
        ("tiles", SMALL, "tiles must have or be block_k from 32, got 16"),
        ("tiles", Tiles(16, 256, 64, CONFIG), r"tiles must have or be block_n and block_k that divide 128, got \(256, 64\)"),
    ):
        with pytest.raises(KernelArgumentError, match=f"matmul_fp8: {message}"):
            launch.matmul_fp8(**(good | {name: value}))
    with pytest.raises(KernelArgumentError, match=r"quantize_int8: x must have or be torch.float32 or .*, got torch.int8"):
        launch.quantize_int8(codes)
    with pytest.raises(KernelArgumentError, match="quantize_fp8: x must have or be stride 1 in the last dimension"):
        launch.quantize_fp8(torch.zeros(8, 4).T)
