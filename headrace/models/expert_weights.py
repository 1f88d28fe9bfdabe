"""Experts one by one, out of files that pack all experts of a layer into one tensor, as GPT-OSS' do.

Such a file holds, for each layer, `….experts.gate_up_proj` and `….experts.down_proj` over all experts, rows and columns swapped,
with gate and up values in turn; or, in mxfp4, `…_blocks` and `…_scales`. Here they read as matrices `….experts.0.gate_proj.weight`
and so on, in the layout of every other checkpoint.

mxfp4 is expanded to bfloat16, which holds its values exactly: 32 values of 4 bits share an exponent of 8 bits.

Source: Open Compute Project, Microscaling Formats specification 1.0 (2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.quantized_layout import StoredMatrix
from headrace.models.tensor_info import TensorInfo
from headrace.models.weights import Weights

_PACKED: Final = re.compile(r"^(.+\.experts)\.(gate_up_proj|down_proj)(|_bias|_blocks|_scales)$")
_BLOCK_VALUES: Final = 32
_BLOCK_BYTES: Final = _BLOCK_VALUES // 2
_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES: Final = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=np.float32)
_EXPONENT_BIAS: Final = 127


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one expert's matrix or bias lies: in which tensor, which of its rows or columns."""

    tensor: str
    expert: int
    rows: slice
    kind: str


def with_single_experts(weights: Weights) -> Weights:
    """Give weights whose experts read one by one; the same where they are not packed as GPT-OSS packs them.

    Raises:
        ModelError: See `ExpertWeights`.
    """
    is_packed = any((found := _PACKED.match(name)) and found[3] == "_bias" for name in weights.names())
    return ExpertWeights(weights) if is_packed else weights


class ExpertWeights(Weights):
    """Weights whose packed experts read one by one; all other tensors read as they are.

    Args:
        weights: The files' own.

    Raises:
        ModelError: A packed tensor has a shape that is none.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._parts: dict[str, _Part] = {}
        self._others: list[str] = []
        for name in weights.names():
            found = _PACKED.match(name)
            if found is None:
                self._others.append(name)
            else:
                self._unpack(name, found[1], found[2], found[3])

    @property
    def metadata(self) -> Mapping[str, Any]:
        """See `Weights.metadata`."""
        return self._weights.metadata

    def names(self) -> list[str]:
        """See `Weights.names`."""
        return self._others + list(self._parts)

    def info(self, name: str) -> TensorInfo:
        """See `Weights.info`."""
        part = self._parts.get(name)
        if part is None:
            return self._weights.info(name)
        packed = self._weights.info(part.tensor)
        if part.kind == "_blocks":
            num_rows, num_blocks, _ = packed.shape[1:]
            return TensorInfo(name, (_num_rows(part.rows, num_rows), num_blocks * _BLOCK_VALUES), "mxfp4")
        if part.kind == "_bias":
            return TensorInfo(name, (_num_rows(part.rows, packed.shape[1]),), packed.dtype_name)
        num_columns, num_rows = packed.shape[1:]
        return TensorInfo(name, (_num_rows(part.rows, num_rows), num_columns), packed.dtype_name)

    def stored_matrix(self, name: str) -> StoredMatrix | None:
        """See `Weights.stored_matrix`."""
        return None if name in self._parts else self._weights.stored_matrix(name)

    def stored_info(self, name: str) -> TensorInfo:
        """See `Weights.stored_info`."""
        return self.info(name) if name in self._parts else self._weights.stored_info(name)

    def load(self, name: str) -> npt.NDArray[Any]:
        """See `Weights.load`."""
        part = self._parts.get(name)
        if part is None:
            return self._weights.load(name)
        if part.kind == "_blocks":
            scales = self._weights.load_item(part.tensor.removesuffix("_blocks") + "_scales", part.expert)
            return _expand(self._weights.load_item(part.tensor, part.expert)[part.rows], scales[part.rows])
        packed = self._weights.load_item(part.tensor, part.expert)
        return np.ascontiguousarray(packed[part.rows] if part.kind == "_bias" else packed[:, part.rows].T)

    def load_item(self, name: str, index: int) -> npt.NDArray[Any]:
        """See `Weights.load_item`."""
        return self.load(name)[index] if name in self._parts else self._weights.load_item(name, index)

    def load_packed(self, name: str, rows: slice = slice(None)) -> npt.NDArray[np.uint8]:
        """See `Weights.load_packed`; for mxfp4 the bytes of the bfloat16 that it is expanded to."""
        if name not in self._parts:
            return self._weights.load_packed(name, rows)
        values = self.load(name)
        return values.view(np.uint8).reshape(values.shape[0] if values.ndim > 1 else 1, -1)[rows]

    def reads_by_rows(self, name: str) -> bool:
        """See `Weights.reads_by_rows`; one expert is expanded or turned over as a whole."""
        return name not in self._parts

    def _unpack(self, name: str, prefix: str, projection: str, kind: str) -> None:
        shape = self._weights.info(name).shape
        self._check(name, shape, kind)
        if kind == "_scales":
            return
        suffix = "bias" if kind == "_bias" else "weight"
        slices = (
            {"down_proj": slice(None)}
            if projection == "down_proj"
            else {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        )
        for expert in range(shape[0]):
            for part, rows in slices.items():
                self._parts[f"{prefix}.{expert}.{part}.{suffix}"] = _Part(name, expert, rows, kind)

    def _check(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        num_dims = {"_blocks": 4, "_bias": 2}.get(kind, 3)
        if len(shape) != num_dims or (kind == "_blocks" and shape[-1] != _BLOCK_BYTES):
            raise ModelError(
                f"tensor {name} has shape {list(shape)}, which no packed experts have; pull the model again", param=name
            )
        if kind == "_blocks":
            scales = name.removesuffix("_blocks") + "_scales"
            found = self._weights.info(scales).shape if scales in self._weights.names() else None
            if found != shape[:-1]:
                raise ModelError(
                    f"tensor {scales} is missing or does not belong to {name} {list(shape)}; pull the model again", param=scales
                )


def _num_rows(rows: slice, num: int) -> int:
    return len(range(*rows.indices(num)))


def _expand(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Blocks `[num_rows, num_blocks, 16]`, low half of a byte first, and their exponents to bfloat16 `[num_rows, num_columns]`."""
    codes = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*scales.shape, _BLOCK_VALUES)
    exponents = scales.astype(np.int32) - _EXPONENT_BIAS
    # The largest exponents, which no real file has, make infinities.
    with np.errstate(over="ignore"):
        values: npt.NDArray[np.float32] = np.ldexp(_VALUES[codes], exponents[..., None])
    # Two digits at most: the lower half of each float32 is zero.
    return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(scales.shape[0], -1)
