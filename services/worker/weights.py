"""Weights of a model directory as torch tensors, each checked against the shape that the model expects.

A model asks for each tensor once, by its Hugging Face name and shape; what it never asks for is an error as well, since a tensor
left over means a model that computes something else than its file says. Each tensor is read run by run of rows straight into its
place, its rows in a stacked matrix included, and the file's pages are let go of, so that the peak is the loaded model and a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from headrace.errors import ModelError
from headrace.models.expert_weights import with_single_experts
from headrace.models.weights import Weights, open_weights
from services.worker.dequantize import BLOCK_TYPES, dequantize_into
from services.worker.quantization.checkpoint_matrices import FP8_DTYPES, read_float8, read_into, read_quantized
from services.worker.quantization.gguf_blocks import BLOCK_LAYOUTS, unpack_blocks
from services.worker.quantization.quantized_matrix import Float8Matrix, QuantizedMatrix
from services.worker.row_runs import row_runs

OnProgress = Callable[[int, int], None]
"""Told after each tensor how many values it has, and how many all tensors have."""

MapParts = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

RAW_BLOCK_TYPES: Final = ("q4_0", "q4_1", "q8_0")
"""GGUF types whose blocks `take_blocks` gives."""

# Tables that old checkpoints stored; they follow from config.json.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
_NAMES_SHOWN_MAX = 5


class WeightLoader:
    """Gives tensors by name, in one floating-point type. `take` and `take_stacked` may be called from several threads at once.

    Args:
        directory: A model directory in Hugging Face layout.
        dtype: The type of every tensor given.
        map_parts: Calls a function for each part of a model, as `map` does; a pool's `map` loads the parts side by side.
        on_progress: See `OnProgress`; called by whichever thread has read a tensor.

    Raises:
        ModelError: The directory's weights are missing, damaged or unsupported.
    """

    def __init__(
        self, directory: Path, *, dtype: torch.dtype, map_parts: MapParts = map, on_progress: OnProgress | None = None
    ) -> None:
        self.dtype = dtype
        self.map = map_parts
        # One entry a tensor given: appending is safe from several threads, adding up is not.
        self._sizes_bytes: list[int] = []
        self.unpacked: dict[str, str] = {}
        """Quantised matrices that the model has as plain numbers, each with the reason."""
        self._directory = directory
        self._weights: Weights = with_single_experts(open_weights(directory))
        self._left = {name for name in self._weights.names() if not name.endswith(_DERIVED_SUFFIXES)}
        self._on_progress = on_progress
        self._num_values = sum(math.prod(self._weights.info(name).shape) for name in self._left)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors given so far."""
        return sum(self._sizes_bytes)

    def has(self, name: str) -> bool:
        """Whether the files hold this tensor."""
        return name in self._left

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ModelError: It is missing, was taken before, or has another shape; names it and both shapes.
        """
        return self.take_stacked([(name, shape)])

    def take_stacked(self, parts: Sequence[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
        """Read several tensors into one, stacked along their first dimension.

        Raises:
            ModelError: As for `take`.
        """
        for name, shape in parts:
            self._check(name, shape)
            self._left.remove(name)
        num_rows = sum(shape[0] for _, shape in parts)
        stacked = torch.empty((num_rows, *parts[0][1][1:]), dtype=self.dtype)
        first_row = 0
        for name, shape in parts:
            _read_into(self._weights, name, stacked[first_row : first_row + shape[0]])
            first_row += shape[0]
            self._tell(shape)
        self._sizes_bytes.append(stacked.nbytes)
        return stacked

    def take_rows(self, name: str, shape: tuple[int, int], *, multiple: int) -> Iterator[torch.Tensor]:
        """Read one matrix a run of rows at a time, each run in memory of its own.

        Args:
            name: The matrix.
            shape: What it has to be.
            multiple: Each run but the last has a multiple of so many rows; itself a multiple of 8.

        Raises:
            ModelError: As for `take`.
        """
        self._check(name, shape)
        if self._weights.stored_matrix(name) is not None or not self._weights.reads_by_rows(name):
            # Eight-bit floats and codes in no order, and single experts: they are put together as a whole.
            whole = self.take(name, shape)
            return (whole[rows] for rows in row_runs(*shape, multiple=multiple))
        self._left.remove(name)

        def read(rows: slice) -> torch.Tensor:
            place = torch.empty((rows.stop - rows.start, shape[1]), dtype=self.dtype)
            _fill(self._weights, name, rows, place)
            return place

        return self._counted(map(read, row_runs(*shape, multiple=multiple)), shape)

    def is_quantized(self, name: str) -> bool:
        """Whether the files hold this tensor as codes or as eight-bit floats."""
        if not self.has(name):
            return False
        return self._weights.stored_matrix(name) is not None or self._weights.info(name).dtype_name in (*BLOCK_LAYOUTS, "mxfp4")

    def take_quantized(self, name: str, shape: tuple[int, int], *, multiple: int) -> Iterator[QuantizedMatrix] | None:
        """Read one matrix as `take_rows` does, in the form in which it is quantised.

        Returns:
            None, and nothing taken, where it is stored as plain numbers.

        Raises:
            ModelError: As for `take`.
        """
        self._check(name, shape)
        stored, dtype_name = self._weights.stored_matrix(name), self._weights.info(name).dtype_name
        if stored is not None:
            matrices = read_quantized(self._weights, stored, multiple=multiple)
            if matrices is None and stored.layout != "fp8":
                self.unpacked[name] = "its groups are not of neighbours (act-order)"
        elif dtype_name in BLOCK_LAYOUTS:
            runs = row_runs(*shape, multiple=multiple)
            matrices = (unpack_blocks(self._weights.load_packed(name, rows), dtype_name) for rows in runs)
        else:
            matrices = None
        if matrices is None:
            return None
        self._left.remove(name)
        return self._counted(matrices, shape)

    def take_float8(self, name: str, shape: tuple[int, int], *, multiple: int) -> Iterator[Float8Matrix] | None:
        """Read one matrix as `take_rows` does, as the eight-bit floats that it is stored as.

        Returns:
            None, and nothing taken, where it is stored as anything else, or as e5m2.

        Raises:
            ModelError: As for `take`.
        """
        self._check(name, shape)
        stored = self._weights.stored_matrix(name)
        if stored is None or stored.layout != "fp8":
            return None
        matrices = read_float8(self._weights, stored, multiple=multiple)
        if matrices is None:
            self.unpacked[name] = "eight-bit floats of type e5m2"
            return None
        self._left.remove(name)
        return self._counted(matrices, shape)

    def take_blocks(
        self, name: str, shape: tuple[int, int], *, multiple: int
    ) -> tuple[str, Iterator[npt.NDArray[np.uint8]]] | None:
        """Read one matrix as `take_rows` does, as the blocks that a GGUF file holds.

        Returns:
            The type, for example `q4_1`, and runs `[num_rows, bytes_per_row]`, rows in Hugging Face order; None, and nothing taken,
            for a type not in `RAW_BLOCK_TYPES`.

        Raises:
            ModelError: As for `take`.
        """
        self._check(name, shape)
        dtype_name = self._weights.info(name).dtype_name
        if dtype_name not in RAW_BLOCK_TYPES:
            return None
        self._left.remove(name)
        runs = row_runs(*shape, multiple=multiple)
        return dtype_name, self._counted((self._weights.load_packed(name, rows) for rows in runs), shape)

    def skip(self, name: str) -> None:
        """Leave a tensor that the model does not need, if it is there."""
        self._left.discard(name)

    def skip_under(self, prefix: str) -> None:
        """Leave all tensors whose names begin with a prefix."""
        self._left -= {name for name in self._left if name.startswith(prefix)}

    def check_all_taken(self) -> None:
        """Refuse weights that hold more than the model asked for, but for biases that add nothing (`_is_idle_bias`).

        Raises:
            ModelError: Names the first tensors left over, with their shapes.
        """
        for name in [name for name in self._left if _is_idle_bias(self._weights, name)]:
            self._left.remove(name)
            self._tell(tuple(self._weights.info(name).shape))
        if not self._left:
            return
        names = sorted(self._left)
        shown = ", ".join(f"{name} {_text(tuple(self._weights.info(name).shape))}" for name in names[:_NAMES_SHOWN_MAX])
        more = f" and {len(names) - _NAMES_SHOWN_MAX} more" if len(names) > _NAMES_SHOWN_MAX else ""
        raise ModelError(
            f"{self._directory}: config.json describes a model without the tensors {shown}{more}; "
            "config.json and the weights are not of one model: pull it again",
            param=names[0],
        )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._left:
            raise ModelError(f"{self._directory}: tensor {name} {_text(shape)} is missing; pull the model again", param=name)
        found = tuple(self._weights.info(name).shape)
        if found != shape:
            raise ModelError(
                f"{self._directory}: tensor {name} has shape {_text(found)}, but config.json asks for {_text(shape)}; "
                "config.json and the weights are not of one model: pull it again",
                param=name,
            )

    def _counted(self, runs: Iterator[_Run], shape: tuple[int, int]) -> Iterator[_Run]:
        for run in runs:
            self._sizes_bytes.append(run.num_bytes if isinstance(run, QuantizedMatrix | Float8Matrix) else run.nbytes)
            yield run
        self._tell(shape)

    def _tell(self, shape: tuple[int, ...]) -> None:
        if self._on_progress is not None:
            self._on_progress(math.prod(shape), self._num_values)


_Run = TypeVar("_Run", bound=QuantizedMatrix | Float8Matrix | torch.Tensor | npt.NDArray[np.uint8])

_PLAIN_DTYPES: Final = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "mxfp4": torch.bfloat16,
    **FP8_DTYPES,
}
"""Numbers that are read as they are, by the name in `TensorInfo.dtype_name`, and the type of what is read."""


def _is_idle_bias(weights: Weights, name: str) -> bool:
    """Whether a tensor is a bias of zeros beside a GPTQ matrix: AutoGPTQ once wrote one for every matrix."""
    module, _, suffix = name.rpartition(".")
    if suffix != "bias":
        return False
    stored = weights.stored_matrix(f"{module}.weight")
    return stored is not None and stored.layout == "gptq" and not weights.load(name).any()


def _read_into(weights: Weights, name: str, place: torch.Tensor) -> None:
    stored = weights.stored_matrix(name)
    if stored is not None:
        read_into(weights, stored, place)
        return
    place = place.view(-1, place.shape[-1])
    runs = row_runs(*place.shape) if weights.reads_by_rows(name) else [slice(0, len(place))]
    for rows in runs:
        _fill(weights, name, rows, place[rows])


def _fill(weights: Weights, name: str, rows: slice, place: torch.Tensor) -> None:
    dtype_name = weights.info(name).dtype_name
    fill = _filler(dtype_name)
    if fill is None:
        raise ModelError(f"tensor {name} holds {dtype_name}, not floating-point numbers", param=name)
    fill(weights.load_packed(name, rows), place)


def _filler(dtype_name: str) -> Callable[[npt.NDArray[np.uint8], torch.Tensor], None] | None:
    """What turns rows of a type into numbers in their place; None for what are no numbers."""
    if dtype_name in _PLAIN_DTYPES:
        return partial(_fill_plain, _PLAIN_DTYPES[dtype_name])
    if dtype_name in BLOCK_TYPES:
        return partial(_fill_blocks, dtype_name)
    return partial(_fill_codes, dtype_name) if dtype_name in BLOCK_LAYOUTS else None


def _fill_plain(dtype: torch.dtype, rows: npt.NDArray[np.uint8], place: torch.Tensor) -> None:
    place.copy_(torch.from_numpy(rows).view(dtype))


def _fill_blocks(dtype_name: str, rows: npt.NDArray[np.uint8], place: torch.Tensor) -> None:
    dequantize_into(rows, dtype_name, place)


def _fill_codes(dtype_name: str, rows: npt.NDArray[np.uint8], place: torch.Tensor) -> None:
    place.copy_(torch.from_numpy(unpack_blocks(rows, dtype_name).dequantize()))


def _text(shape: tuple[int, ...]) -> str:
    return str(list(shape))
