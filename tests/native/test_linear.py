"""Goal: products with packed matrices, in every form in which they are packed, are those of `kernels/cpu/reference.py`.

Bounds are on the rounding of float32 sums alone: a few units of 2 ** -24 for each addition, of the sum of the terms' magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernels.cpu import library as native
from kernels.cpu.reference import CodedMatrix, activate, gguf_blocks, multiply_codes, quantize, round_bfloat16
from tests.native.programs import Program, input_kind

EPS = 2.0**-24
NUM_ROWS = 40
DENSE = ("f32", "bf16")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix, and what it stands for.

    Attributes:
        weights: `[n, k]`.
        num_sums: Additions of a product.
        coded: The matrix, where it is one of codes.
    """

    packed: native.PackedMatrix
    weights: npt.NDArray[np.float64]
    num_sums: int
    coded: CodedMatrix | None = None

    def multiply(self, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Products `[rows, n]`, and a bound on the rounding of their sums."""
        if self.coded is not None:
            products, sizes = multiply_codes(x, self.coded)
        else:
            seen = (round_bfloat16(x) if input_kind(self.packed) == native.KIND_BF16 else x).astype(np.float64)
            products, sizes = seen @ self.weights.T, np.abs(seen) @ np.abs(self.weights.T)
        return products, EPS * (self.num_sums + 4) * sizes


def make_dense(library: Any, random: np.random.Generator, n: int, k: int, *, is_bf16: bool) -> Matrix:
    values = random.standard_normal((n, k)).astype(np.float32)
    if is_bf16:
        values = round_bfloat16(values)
        packed = native.pack_dense(library, (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16))
    else:
        packed = native.pack_dense(library, values)
    return Matrix(packed, values.astype(np.float64), k)


def make_blocks(library: Any, random: np.random.Generator, n: int, k: int, *, dtype_name: str) -> Matrix:
    num_halves, code_bytes = {"q4_0": (1, 16), "q4_1": (2, 16), "q8_0": (1, 32)}[dtype_name]
    halves = (random.standard_normal((n, k // 32, num_halves)) * 0.05).astype(np.float16)
    codes = random.integers(0, 256, (n, k // 32, code_bytes), dtype=np.uint8)
    rows = np.concatenate([halves.view(np.uint8), codes], axis=2).reshape(n, -1)
    return coded(native.pack_blocks(library, dtype_name, rows, k), gguf_blocks(dtype_name, rows))


@dataclass(frozen=True, slots=True)
class Codes:
    """A form of group-quantised weights."""

    bits: int
    group: int
    scale_dtype: Any
    zero: int | None
    has_flat_groups: bool = False

    def __call__(self, library: Any, random: np.random.Generator, n: int, k: int) -> Matrix:
        shape = (n, k // self.group)
        codes = random.integers(0, 2**self.bits, (n, k), dtype=np.uint8)
        scales = (random.standard_normal(shape) * 0.05).astype(self.scale_dtype)
        minimums = random.standard_normal(shape).astype(self.scale_dtype) if self.zero is None else None
        if self.has_flat_groups:
            scales[::3], scales[1::3] = 0, np.finfo(self.scale_dtype).smallest_subnormal
            if minimums is not None:
                minimums[::6] = 0
        matrix = CodedMatrix(codes, scales, self.zero or 0, minimums, self.bits)
        packed = native.pack_codes(library, codes, bits=self.bits, scales=scales, zero=self.zero or 0, minimums=minimums)
        return coded(packed, matrix)


def coded(packed: native.PackedMatrix, matrix: CodedMatrix) -> Matrix:
    return Matrix(packed, matrix.weights(), packed.in_features // 8, matrix)


FORMS: dict[str, Callable[[Any, np.random.Generator, int, int], Matrix]] = {
    "f32": lambda *a: make_dense(*a, is_bf16=False),
    "bf16": lambda *a: make_dense(*a, is_bf16=True),
    "q4_0": lambda *a: make_blocks(*a, dtype_name="q4_0"),
    "q4_1": lambda *a: make_blocks(*a, dtype_name="q4_1"),
    "q8_0": lambda *a: make_blocks(*a, dtype_name="q8_0"),
    "q4_float_zero": Codes(4, 32, np.float32, 3),
    "q4_float_minimums": Codes(4, 32, np.float32, None),
    "q4_half_minimums_16": Codes(4, 16, np.float16, None),
    "q4_float_zero_16": Codes(4, 16, np.float32, 8),
    "q4_half_zero_128": Codes(4, 128, np.float16, 8),
    "q4_half_minimums_128": Codes(4, 128, np.float16, None),
    "q4_half_flat": Codes(4, 32, np.float16, None, has_flat_groups=True),
    "q8_float_flat": Codes(8, 32, np.float32, None, has_flat_groups=True),
    "q8_float_zero": Codes(8, 32, np.float32, 128),
    "q8_float_minimums": Codes(8, 32, np.float32, None),
    "q8_half_minimums": Codes(8, 32, np.float16, None),
    "q6_half_zero_16": Codes(6, 16, np.float16, 32),
    "q6_float_minimums_16": Codes(6, 16, np.float32, None),
    "q8_half_zero_128": Codes(8, 128, np.float16, 0),
}


def widths(form: str) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs; neither need be whole panels, but codes come in groups."""
    if form in DENSE:
        return (75, 80), (32, 512), (1, 33)
    return (75, 384), (32, 128), (1, 128)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def inputs(random: np.random.Generator, k: int) -> npt.NDArray[np.float32]:
    """Rows of very different sizes, one of them zeros."""
    x = random.standard_normal((NUM_ROWS, k)) * 10.0 ** random.integers(-3, 3, (NUM_ROWS, 1))
    x[5] = 0
    return x.astype(np.float32)


def test_product_is_that_of_the_weights(library: Any, isa: int, form: str, random: np.random.Generator) -> None:
    for n, k in widths(form):
        matrix = FORMS[form](library, random, n, k)
        x, bias = inputs(random, k), random.standard_normal(n).astype(np.float32)
        program = Program(library, isa=isa)
        program.finish(program.product(x, matrix.packed, bias), n)
        products, bound = matrix.multiply(x)
        bound += 4 * EPS * (np.abs(bias) + np.abs(products))
        difference = np.abs(program.run(np.arange(NUM_ROWS)) - (products + bias))
        assert (difference <= bound).all(), (n, k, float((difference / bound).max()))


def test_rows_are_the_same_bits_alone_and_together(library: Any, isa: int, form: str, random: np.random.Generator) -> None:
    n, k = widths(form)[0]
    x = inputs(random, k)
    program = Program(library, isa=isa)
    program.finish(program.product(x, FORMS[form](library, random, n, k).packed), n)
    whole = program.run(np.arange(NUM_ROWS))
    for num_rows in range(1, NUM_ROWS):
        rows = random.permutation(NUM_ROWS)[:num_rows]
        assert np.array_equal(program.run(rows), whole[rows]), num_rows


def test_many_rows_are_the_same_bits_with_any_number_of_threads(library: Any, form: str, random: np.random.Generator) -> None:
    """Enough rows that they are shared by rows, too; the last of them are the first once more."""
    n, k = widths(form)[0]
    x, packed = inputs(random, k), FORMS[form](library, random, n, k).packed
    results = []
    for num_threads in (1, 2, 3):
        program = Program(library, isa=library.hr_best_isa(), num_threads=num_threads, max_tokens=200)
        program.finish(program.product(x, packed), n)
        results.append(program.run(np.arange(200) % NUM_ROWS))
        assert np.array_equal(results[-1][160:], results[-1][:40])
        assert np.array_equal(results[-1], results[0])
        assert np.array_equal(program.run(np.arange(7)), results[0][:7])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_poison_ends_in_its_own_row(library: Any, isa: int, form: str, poison: float, random: np.random.Generator) -> None:
    n, k = widths(form)[0]
    x, packed = inputs(random, k), FORMS[form](library, random, n, k).packed
    poisoned = x.copy()
    poisoned[[3, 5, 17], [0, 31, k - 1]] = poison
    results = []
    for given in (x, poisoned):
        program = Program(library, isa=isa)
        results.append(program.finish(program.product(given, packed), n).run(np.arange(NUM_ROWS)))
    clean, dirty = results
    is_hit = np.isin(np.arange(NUM_ROWS), [3, 5, 17])
    assert not np.isfinite(dirty[is_hit]).any()
    assert np.array_equal(dirty[~is_hit], clean[~is_hit])


def test_codes_stand_for_the_weights(form: str, library: Any, random: np.random.Generator) -> None:
    """What products round on purpose is small: bfloat16 for what minimums are beyond whole steps, beside int8 for each number."""
    if form in DENSE:
        return
    x = random.standard_normal((NUM_ROWS, 384)).astype(np.float32)
    matrix = FORMS[form](library, random, 75, 384)
    seen = quantize(x)
    exact = x @ matrix.weights.T
    by_inputs = np.square(seen @ matrix.weights.T - exact).mean()
    # Blocks as files have them, and minimums many steps away from all codes.
    assert np.square(matrix.multiply(x)[0] - exact).mean() <= (1.3 if isinstance(FORMS[form], Codes) else 1.002) * by_inputs


def test_int8_inputs_are_exactly_those_of_the_reference(library: Any, isa: int, random: np.random.Generator) -> None:
    x = inputs(random, 96)
    # Ties of rounding, groups far from 0 and all of one number, magnitudes whose scale has no inverse in float32, and the largest.
    x[7, :32] = np.arange(32) * 0.5 - 8
    x[7, 0] = 117.5
    x[11, :32], x[12] = 1000 + x[11, :32], -3.3
    x[8], x[9], x[10] = x[8] * 1e-42, 1e-36, 2e33
    program = Program(library, isa=isa)
    packed = program.packed(program.feed(x), 96, native.KIND_Q8)
    out = program.finish(program.unpacked(packed, 96), 96).run(np.arange(NUM_ROWS))
    assert np.array_equal(out, quantize(x).astype(np.float32))


def test_a_row_that_no_scale_reaches_is_not_finite(library: Any, isa: int, random: np.random.Generator) -> None:
    """Scales end at 2 ** 104, so numbers of a group do at 253 times that; the other rows know nothing of it."""
    x = inputs(random, 96)
    x[3, 5], x[4, 5] = 253 * 2.0**104, 260 * 2.0**104
    packed = FORMS["q4_1"](library, random, 75, 96).packed
    program = Program(library, isa=isa)
    out = program.finish(program.product(x, packed), 75).run(np.arange(NUM_ROWS))
    assert np.isfinite(out[np.arange(NUM_ROWS) != 4]).all()
    assert np.isnan(out[4]).all()


@pytest.mark.parametrize("scale", [1.0, -0.22])
def test_products_of_several_parts_add_to_their_target(library: Any, isa: int, scale: float, random: np.random.Generator) -> None:
    """As a residual stream takes them: three parts of two forms, outputs that are no whole panels, and a bias."""
    parts = [
        FORMS["q4_1"](library, random, 75, 128),
        FORMS["q8_0"](library, random, 32, 128),
        FORMS["q4_0"](library, random, 9, 128),
    ]
    packed = native.stack([part.packed for part in parts])
    x, y = inputs(random, 128), random.standard_normal((NUM_ROWS, 116)).astype(np.float32)
    bias = random.standard_normal(116).astype(np.float32)
    program = Program(library, isa=isa)
    target = program.feed(y)
    program.linear(program.packed(program.feed(x), 128, native.KIND_Q8), packed, target, bias, scale)
    program.finish(program.gather(target, 116), 116)
    products, bounds = zip(*(part.multiply(x) for part in parts), strict=True)
    product = np.concatenate(products, axis=1)
    expected = y + scale * (product + bias)
    bound = np.concatenate(bounds, axis=1) + 4 * EPS * (np.abs(product) + np.abs(bias) + np.abs(y))
    rows = random.permutation(NUM_ROWS)[:17]
    assert (np.abs(program.run(np.arange(NUM_ROWS), sampled=rows) - expected[rows]) <= bound[rows]).all()


@pytest.mark.parametrize("name", native.ACTIVATIONS)
@pytest.mark.parametrize("pair", [("q4_1", "q4_1"), ("q4_0", "q8_0"), ("bf16", "bf16"), ("f32", "f32")], ids="-".join)
def test_gated_product_is_activation_of_gate_times_up(
    library: Any, isa: int, pair: tuple[str, str], name: str, random: np.random.Generator
) -> None:
    n, k = 64, 128
    gate, up = (FORMS[form](library, random, n, k) for form in pair)
    x = random.standard_normal((NUM_ROWS, k)).astype(np.float32)
    bias = random.standard_normal(2 * n).astype(np.float32)
    stacked = native.stack([gate.packed, up.packed])
    halves = native.split_in_two(library, stacked)
    assert halves is not None
    program = Program(library, isa=isa)
    source, out = program.packed(program.feed(x), k, input_kind(gate.packed)), program.value(n)
    program.keep(stacked)
    segments = (native.Segment * 2)(*halves)
    library.hr_gated_linear(program.pointer, source, out, segments, program.vector(bias), native.ACTIVATIONS[name])
    result = program.finish(out, n).run(np.arange(NUM_ROWS))
    (gates, gate_bound), (ups, up_bound) = gate.multiply(x), up.multiply(x)
    gates, ups = gates + bias[:n], ups + bias[n:]
    known = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}.get(name, name)
    bounds = [bound + 4 * EPS * (m.num_sums + 4) for bound, m in ((gate_bound, gate), (up_bound, up))]
    # The functions' slopes are at most 1.13; their own errors are a few units of float32.
    bound = (
        1.13 * bounds[0] * np.abs(ups) + (np.abs(gates) + bounds[0]) * bounds[1] + 4e-7 * (1 + np.abs(gates)) * (np.abs(ups) + 1)
    )
    assert (np.abs(result - activate(gates, known) * ups) <= bound).all()


def test_gated_product_goes_straight_into_the_form_that_is_wanted(library: Any, isa: int, random: np.random.Generator) -> None:
    matrix = FORMS["q4_1"](library, random, 128, 96).packed
    x = inputs(random, 96)
    outs = []
    for kind in (native.KIND_F32, native.KIND_Q8):
        program = Program(library, isa=isa)
        source, out = program.packed(program.feed(x), 96, native.KIND_Q8), program.value(64, kind)
        segments = (native.Segment * 2)(*(native.split_in_two(library, program.keep(matrix)) or ()))
        library.hr_gated_linear(program.pointer, source, out, segments, None, 0)
        final = out if kind == native.KIND_F32 else program.unpacked(out, 64)
        outs.append(program.finish(final, 64).run(np.arange(NUM_ROWS)))
    assert np.array_equal(quantize(outs[0]).astype(np.float32), outs[1])


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_embedding_rows_are_the_tables(library: Any, isa: int, form: str, scale: float, random: np.random.Generator) -> None:
    n, k = widths(form)[0]
    matrix = FORMS[form](library, random, n, k)
    program = Program(library, isa=isa)
    ids = random.integers(0, n, NUM_ROWS)
    out = program.finish(program.embed(matrix.packed, scale), k).run(ids)
    # One rounding: what is left of a difference of code and minimum is of their size.
    assert (np.abs(out - scale * matrix.weights[ids]) <= 1.01 * EPS * scale * np.abs(matrix.weights[ids]) + 1e-12).all()
