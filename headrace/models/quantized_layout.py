"""Which stored tensors of a quantised safetensors checkpoint belong together as one matrix, and the matrix's shape.

A quantised matrix is stored as several tensors: codes, scales, zero points, an order. Here they are found by their names and types
and checked against one another, from headers alone; putting the numbers together is the worker's part.

Layouts, words being int32:
    awq: `qweight` words `[in, out * bits / 32]`, the eight codes of one in the order 0 2 4 6 1 3 5 7; `qzeros` likewise, one row a
        group; `scales` `[groups, out]`.
    gptq: `qweight` words `[in * bits / 32, out]`; `qzeros` words `[groups, out * bits / 32]`; `scales` `[groups, out]`; `g_idx`
        `[in]`, the group of each input.
    packed: `weight_packed` words `[out, in * bits / 32]`, a code being a number plus half the range; `weight_scale`
        `[out, groups]`; `weight_zero_point` of as many, packed along its rows or plain; `weight_g_idx` as in gptq; `weight_shape`,
        two numbers.
    int8: `weight` int8 `[out, in]`; `weight_scale` `[out, groups]`; `weight_zero_point` int8.
    fp8: `weight` `[out, in]`; `weight_scale` or `weight_scale_inv`, both factors of the weights: one, one a row, or one a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.quantization_config import QUANTIZATION_KEY, QuantizationScheme
from headrace.models.tensor_info import TensorInfo

FP8_TYPES: Final = ("f8_e4m3", "f8_e5m2")
FLOAT_TYPES: Final = ("f32", "f16", "bf16")
_WORD_BITS: Final = 32

# What belongs to activations and the KV cache, which are computed in floating point here.
_UNUSED_SUFFIXES: Final = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
_QUANTIZED_SUFFIXES: Final = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A quantised matrix.

    Attributes:
        name: As the model asks for it: `…q_proj.weight`.
        shape: `(out, in)`.
        layout: See above.
        bits: Size of a code.
        dtype_name: For people: `awq_int4`.
        parts: Names of the stored tensors by role: `codes`, `scales`, and where there are any `zeros` and `order`.
        scheme: What config.json says.
    """

    name: str
    shape: tuple[int, int]
    layout: str
    bits: int
    dtype_name: str
    parts: Mapping[str, str]
    scheme: QuantizationScheme


def group_tensors(
    tensors: Mapping[str, TensorInfo], scheme: QuantizationScheme | None, read: Callable[[str], npt.NDArray[Any]]
) -> tuple[dict[str, StoredMatrix], set[str]]:
    """Find the quantised matrices of a checkpoint.

    Args:
        tensors: All that is stored.
        scheme: What config.json says; None where it says nothing.
        read: Reads a stored tensor; called for the two numbers of a `weight_shape` only.

    Returns:
        Matrices by the name that the model asks for, and the stored names that are not tensors of the model by themselves.

    Raises:
        ModelError: A part is missing, or parts contradict one another.
    """
    if scheme is None:
        packed = next((name for name in tensors if name.endswith(_QUANTIZED_SUFFIXES)), None)
        if packed is not None:
            raise ModelError(
                f"tensor {packed} belongs to a quantised matrix, but config.json has no {QUANTIZATION_KEY}; pull the model again"
            )
        return {}, set()
    grouping = _Grouping(tensors, scheme, read)
    matrices = {matrix.name: matrix for matrix in grouping.matrices()}
    used = {part for matrix in matrices.values() for part in matrix.parts.values()} | grouping.also_used
    return matrices, used | {name for name in tensors if name.endswith(_UNUSED_SUFFIXES)}


class _Grouping:
    """One pass over the stored names."""

    def __init__(
        self, tensors: Mapping[str, TensorInfo], scheme: QuantizationScheme, read: Callable[[str], npt.NDArray[Any]]
    ) -> None:
        self._tensors = tensors
        self._scheme = scheme
        self._read = read
        self.also_used: set[str] = set()

    def matrices(self) -> Iterable[StoredMatrix]:
        packs_words = self._scheme.method in ("awq", "gptq")
        for name, tensor in self._tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix == "qweight" and packs_words:
                yield self._awq(module) if self._scheme.method == "awq" else self._gptq(module)
            elif suffix == "weight_packed":
                yield self._packed(module)
            elif suffix == "weight" and tensor.dtype_name == "i8":
                yield self._int8(module)
            elif suffix == "weight" and tensor.dtype_name in FP8_TYPES:
                yield self._fp8(module)

    def _awq(self, module: str) -> StoredMatrix:
        parts = {"codes": f"{module}.qweight", "scales": f"{module}.scales", "zeros": f"{module}.qzeros"}
        bits = self._scheme.bits or 4
        num_in, num_words = self._pair(parts["codes"], "i32")
        num_out = num_words * _WORD_BITS // bits
        num_groups = self._groups(parts["scales"], axis=0, other=num_out)
        if num_in % num_groups:
            self._contradict(parts["scales"], f"{num_groups} groups do not divide {num_in} inputs")
        self._expect(parts["zeros"], ("i32",), (num_groups, num_words))
        return self._matrix(module, (num_out, num_in), "awq", bits, f"awq_int{bits}", parts)

    def _gptq(self, module: str) -> StoredMatrix:
        parts = {"codes": f"{module}.qweight", "scales": f"{module}.scales", "zeros": f"{module}.qzeros"}
        bits = self._scheme.bits or 4
        num_words, num_out = self._pair(parts["codes"], "i32")
        num_in = num_words * _WORD_BITS // bits
        num_groups = self._groups(parts["scales"], axis=0, other=num_out)
        if num_out * bits % _WORD_BITS:
            self._contradict(parts["codes"], f"{num_out} outputs of {bits} bits do not fill words of {_WORD_BITS}")
        self._expect(parts["zeros"], ("i32",), (num_groups, num_out * bits // _WORD_BITS))
        self._add_order(parts, f"{module}.g_idx", num_in, num_groups)
        return self._matrix(module, (num_out, num_in), "gptq", bits, f"gptq_int{bits}", parts)

    def _packed(self, module: str) -> StoredMatrix:
        parts = {"codes": f"{module}.weight_packed", "scales": f"{module}.weight_scale"}
        num_out, num_words = self._pair(parts["codes"], "i32")
        shape_name = f"{module}.weight_shape"
        self._expect(shape_name, ("i64", "i32"), (2,))
        self.also_used.add(shape_name)
        rows, num_in = (int(size) for size in self._read(shape_name))
        bits = next((bits for bits in (4, 8) if num_in > 0 and -(-num_in // (_WORD_BITS // bits)) == num_words), None)
        if rows != num_out or bits is None:
            self._contradict(shape_name, f"[{rows}, {num_in}] is not the shape of {list(self._shape(parts['codes']))} words")
        num_groups = self._groups(parts["scales"], axis=1, other=num_out)
        zeros = f"{module}.weight_zero_point"
        if zeros in self._tensors:
            is_packed = self._tensors[zeros].dtype_name == "i32"
            num_rows = -(-num_out // (_WORD_BITS // bits)) if is_packed else num_out
            self._expect(zeros, ("i32", "i8"), (num_rows, num_groups))
            parts["zeros"] = zeros
        self._add_order(parts, f"{module}.weight_g_idx", num_in, num_groups)
        return self._matrix(module, (num_out, num_in), "packed", bits, f"int{bits}", parts)

    def _int8(self, module: str) -> StoredMatrix:
        parts = {"codes": f"{module}.weight", "scales": f"{module}.weight_scale"}
        num_out, num_in = self._pair(parts["codes"], "i8")
        num_scales = self._num_scales(parts["scales"])
        zeros = f"{module}.weight_zero_point"
        if zeros in self._tensors:
            self._expect(zeros, ("i8",), self._shape(parts["scales"]))
            parts["zeros"] = zeros
        if num_scales != 1:
            num_groups = self._groups(parts["scales"], axis=1, other=num_out)
            if num_in % num_groups:
                self._contradict(parts["scales"], f"{num_groups} groups do not divide {num_in} inputs")
        return self._matrix(module, (num_out, num_in), "int8", 8, "int8", parts)

    def _fp8(self, module: str) -> StoredMatrix:
        codes = f"{module}.weight"
        tensor = self._tensors[codes]
        num_out, num_in = self._pair(codes, tensor.dtype_name)
        scales = next((name for name in (f"{codes}_scale", f"{codes}_scale_inv") if name in self._tensors), f"{codes}_scale")
        num_scales, shape = self._num_scales(scales), self._shape(scales)
        block = self._scheme.block_shape
        by_block = None if block is None else (-(-num_out // block[0]), -(-num_in // block[1]))
        if num_scales != 1 and shape not in ((num_out,), (num_out, 1), by_block):
            expected = "one scale, one a row" + ("" if block is None else f" or one for {block[0]} rows of {block[1]}")
            self._contradict(scales, f"it has shape {list(shape)} for [{num_out}, {num_in}] weights, which have {expected}")
        return self._matrix(module, (num_out, num_in), "fp8", 8, tensor.dtype_name, {"codes": codes, "scales": scales})

    def _matrix(
        self, module: str, shape: tuple[int, int], layout: str, bits: int, dtype_name: str, parts: dict[str, str]
    ) -> StoredMatrix:
        return StoredMatrix(f"{module}.weight", shape, layout, bits, dtype_name, parts, self._scheme)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise ModelError(f"tensor {name} is missing, without which its matrix cannot be read; pull the model again", param=name)
        return self._tensors[name]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def _pair(self, name: str, dtype_name: str) -> tuple[int, int]:
        """The shape of a tensor that must have two dimensions, neither of them empty."""
        tensor = self._tensor(name)
        if tensor.dtype_name != dtype_name or len(tensor.shape) != 2 or 0 in tensor.shape:
            self._contradict(name, f"it is {tensor.dtype_name} {list(tensor.shape)}, not {dtype_name} of two dimensions")
        return tensor.shape[0], tensor.shape[1]

    def _groups(self, name: str, *, axis: int, other: int) -> int:
        """Number of groups of floating-point scales whose other dimension is known."""
        tensor = self._tensor(name)
        shape = tensor.shape if len(tensor.shape) == 2 or axis == 0 else (*tensor.shape, 1)
        if tensor.dtype_name not in FLOAT_TYPES or len(shape) != 2 or shape[1 - axis] != other or 0 in shape:
            self._contradict(name, f"it is {tensor.dtype_name} {list(tensor.shape)}; scales of {other} outputs are expected")
        return shape[axis]

    def _num_scales(self, name: str) -> int:
        tensor = self._tensor(name)
        if tensor.dtype_name not in FLOAT_TYPES or 0 in tensor.shape:
            self._contradict(name, f"it is {tensor.dtype_name} {list(tensor.shape)}, not floating-point scales")
        return math.prod(tensor.shape)

    def _expect(self, name: str, dtype_names: tuple[str, ...], shape: tuple[int, ...]) -> None:
        tensor = self._tensor(name)
        if tensor.dtype_name not in dtype_names or tensor.shape != shape:
            found = f"{tensor.dtype_name} {list(tensor.shape)}"
            self._contradict(name, f"it is {found}; {' or '.join(dtype_names)} {list(shape)} is expected")

    def _add_order(self, parts: dict[str, str], name: str, num_in: int, num_groups: int) -> None:
        """Add the tensor that gives each input's group; without one, groups are of equal size and in order."""
        if name in self._tensors:
            self._expect(name, ("i32", "i64"), (num_in,))
            parts["order"] = name
        elif num_in % num_groups:
            self._contradict(parts["scales"], f"{num_groups} groups do not divide {num_in} inputs")

    def _contradict(self, name: str, what: str) -> NoReturn:
        raise ModelError(f"tensor {name} does not fit the others of its matrix: {what}; pull the model again", param=name)


def is_in_order(groups: npt.NDArray[Any], num_groups: int) -> bool:
    """Whether each input's group is what it is without an `order`: equal groups, one after another."""
    size, rest = divmod(len(groups), num_groups)
    return rest == 0 and bool(np.array_equal(groups, np.arange(len(groups)) // size))
