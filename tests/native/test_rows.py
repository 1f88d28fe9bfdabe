"""Goal: operations that take rows one by one are those of `kernels/cpu/reference.py`, whatever form they write."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernels.cpu import library as native
from kernels.cpu.reference import activate, norm, quantize, round_bfloat16
from tests.native.programs import Program

NUM_ROWS = 40
ROWS = np.arange(NUM_ROWS)
KNOWN_AS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
SIGMOID_TAIL = 4e-7
"""What activation functions may differ by, beside inputs of order 1: a few units of float32."""


def inputs(random: np.random.Generator, width: int) -> npt.NDArray[np.float32]:
    x = (random.standard_normal((NUM_ROWS, width)) * 10.0 ** random.integers(-3, 3, (NUM_ROWS, 1))).astype(np.float32)
    x[5] = 0
    return x


def run_norm(library: Any, isa: int, x: Any, weight: Any, bias: Any, kind: int = native.KIND_F32) -> npt.NDArray[np.float32]:
    """A norm into any form, read back as numbers; layer norm where there is a bias."""
    width = x.shape[1]
    program = Program(library, isa=isa)
    out = program.value(width, kind)
    is_layer_norm = int(bias is not None)
    library.hr_norm(program.pointer, program.feed(x), out, program.vector(weight), program.vector(bias), 1e-5, is_layer_norm)
    if kind == native.KIND_BF16:
        eye = (np.eye(width, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
        out = program.linear(out, native.pack_dense(library, eye), program.value(width))
    elif kind == native.KIND_Q8:
        out = program.unpacked(out, width)
    return program.finish(out, width).run(ROWS)


@pytest.mark.parametrize("is_layer_norm", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("width", [16, 48, 80, 512, 576])
def test_norm(library: Any, isa: int, width: int, is_layer_norm: bool, random: np.random.Generator) -> None:
    x, weight = inputs(random, width), random.standard_normal(width).astype(np.float32)
    bias = random.standard_normal(width).astype(np.float32) if is_layer_norm else None
    expected = norm(x, weight, bias, eps=1e-5, is_layer_norm=is_layer_norm)
    difference = np.abs(run_norm(library, isa, x, weight, bias) - expected)
    assert (difference <= 2e-6 * (np.abs(expected) + np.abs(weight) + np.abs(0 if bias is None else bias))).all()


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("is_layer_norm", [False, True], ids=["rms", "layer"])
def test_norm_writes_the_form_that_is_wanted(
    library: Any, isa: int, width: int, is_layer_norm: bool, random: np.random.Generator
) -> None:
    x, weight = inputs(random, width), random.standard_normal(width).astype(np.float32)
    bias = random.standard_normal(width).astype(np.float32) if is_layer_norm else None
    numbers = run_norm(library, isa, x, weight, bias)
    assert np.array_equal(run_norm(library, isa, x, weight, bias, native.KIND_BF16), round_bfloat16(numbers))
    assert np.array_equal(run_norm(library, isa, x, weight, bias, native.KIND_Q8), quantize(numbers).astype(np.float32))


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
def test_poison_ends_in_its_own_row(library: Any, isa: int, poison: float, random: np.random.Generator) -> None:
    x, weight = inputs(random, 64), np.ones(64, np.float32)
    poisoned = x.copy()
    poisoned[[0, 9, 39], [0, 31, 63]] = poison
    is_hit = np.isin(ROWS, [0, 9, 39])
    for kind in (native.KIND_F32, native.KIND_BF16, native.KIND_Q8):
        clean, dirty = (run_norm(library, isa, given, weight, None, kind) for given in (x, poisoned))
        assert not np.isfinite(dirty[is_hit]).all(axis=1).any()
        assert np.array_equal(dirty[~is_hit], clean[~is_hit])


@pytest.mark.parametrize("name", native.ACTIVATIONS)
def test_activation_and_gate(library: Any, isa: int, name: str, random: np.random.Generator) -> None:
    x = inputs(random, 96)
    x[6] = np.linspace(-20, 20, 96)
    functions = activate(x, KNOWN_AS.get(name, name))
    for op, width in ((native.OP_ACTIVATE, 96), (native.OP_GATED, 48)):
        program = Program(library, isa=isa)
        out = program.plain(op, program.feed(x), program.value(width), native.ACTIVATIONS[name])
        result = program.finish(out, width).run(ROWS)
        factor = x[:, 48:].astype(np.float64) if op == native.OP_GATED else np.ones(1)
        bound = SIGMOID_TAIL * (np.abs(x) + np.abs(functions))[:, :width] * np.abs(factor) + 1e-30
        assert (np.abs(result - functions[:, :width] * factor) <= bound).all(), op


def test_activation_keeps_what_is_not_finite(library: Any, isa: int) -> None:
    x = np.full((1, 32), np.nan, np.float32)
    for number in set(native.ACTIVATIONS.values()):
        program = Program(library, isa=isa)
        out = program.plain(native.OP_ACTIVATE, program.feed(x), program.value(32), number)
        assert np.isnan(program.finish(out, 32).run([0])).all(), number


@pytest.mark.parametrize("width", [16, 48, 544])
def test_sum_scale_and_soft_cap(library: Any, isa: int, width: int, random: np.random.Generator) -> None:
    x, y = inputs(random, width), inputs(random, width)
    doubles, others = x.astype(np.float64), y.astype(np.float64)
    for op, number, expected in (
        (native.OP_ADD, 0.22, doubles + np.float32(0.22) * others),
        (native.OP_SCALE, -0.7, doubles * np.float32(-0.7)),
        (native.OP_SOFT_CAP, 30.0, 30 * np.tanh(doubles / 30)),
    ):
        program = Program(library, isa=isa)
        target = program.feed(x)
        program.plain(op, program.feed(y) if op == native.OP_ADD else -1, target, number)
        rows = random.permutation(NUM_ROWS)[:13]
        result = program.finish(program.gather(target, width), width).run(ROWS, sampled=rows)
        # A hyperbolic tangent is a difference of numbers of order 1, times the cap.
        error = 30 * 2e-7 if op == native.OP_SOFT_CAP else 0.0
        bound = 2.0**-23 * (np.abs(doubles) + np.abs(others)) + error
        assert (np.abs(result - expected[rows]) <= bound[rows]).all(), op
