"""Weights of a model directory as torch tensors, each checked against the shape that the model expects.

A model asks for each tensor once, by its Hugging Face name and shape; what it never asks for is an error as well, since a tensor
left over means a model that computes something else than its file says. Each tensor is read straight into its place, its rows in a
stacked matrix included, so that the peak is the loaded model plus one tensor as it lies in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from headrace.errors import ModelError
from headrace.models.expert_weights import with_single_experts
from headrace.models.weights import Weights, open_weights
from services.worker.dequantize import BLOCK_TYPES, dequantize_into
from services.worker.quantization.checkpoint_matrices import FP8_DTYPES, read_into, read_quantized
from services.worker.quantization.gguf_blocks import BLOCK_LAYOUTS, unpack_blocks
from services.worker.quantization.quantized_matrix import QuantizedMatrix

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

    Raises:
        ModelError: The directory's weights are missing, damaged or unsupported.
    """

    def __init__(self, directory: Path, *, dtype: torch.dtype, map_parts: MapParts = map) -> None:
        self.dtype = dtype
        self.map = map_parts
        # One entry a tensor given: appending is safe from several threads, adding up is not.
        self._sizes_bytes: list[int] = []
        self.unpacked_names: list[str] = []
        """Matrices of integer codes that could be given as plain numbers only, since their groups are not of neighbours."""
        self._directory = directory
        self._weights: Weights = with_single_experts(open_weights(directory))
        self._left = {name for name in self._weights.names() if not name.endswith(_DERIVED_SUFFIXES)}

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
            self._read_into(name, stacked[first_row : first_row + shape[0]])
            first_row += shape[0]
        self._sizes_bytes.append(stacked.nbytes)
        return stacked

    def take_quantized(self, name: str, shape: tuple[int, int]) -> QuantizedMatrix | None:
        """Read one matrix in the form in which it is quantised; None, and nothing taken, where it is stored as plain numbers.

        Raises:
            ModelError: As for `take`.
        """
        self._check(name, shape)
        stored, dtype_name = self._weights.stored_matrix(name), self._weights.info(name).dtype_name
        if stored is not None:
            matrix = read_quantized(self._weights, stored)
            if matrix is None and stored.layout != "fp8":
                self.unpacked_names.append(name)
        else:
            matrix = unpack_blocks(self._weights.load_packed(name), dtype_name) if dtype_name in BLOCK_LAYOUTS else None
        if matrix is None:
            return None
        self._left.remove(name)
        self._sizes_bytes.append(matrix.num_bytes)
        return matrix

    def take_blocks(self, name: str, shape: tuple[int, int]) -> tuple[str, npt.NDArray[np.uint8]] | None:
        """Read one matrix as the blocks that a GGUF file holds; None, and nothing taken, for a type not in `RAW_BLOCK_TYPES`.

        Returns:
            The type, for example `q4_1`, and `[num_rows, bytes_per_row]` in memory of its own, rows in Hugging Face order.

        Raises:
            ModelError: As for `take`.
        """
        self._check(name, shape)
        dtype_name = self._weights.info(name).dtype_name
        if dtype_name not in RAW_BLOCK_TYPES:
            return None
        self._left.remove(name)
        rows = self._weights.load_packed(name)
        self._sizes_bytes.append(rows.nbytes)
        return dtype_name, rows

    def skip(self, name: str) -> None:
        """Leave a tensor that the model does not need, if it is there."""
        self._left.discard(name)

    def skip_under(self, prefix: str) -> None:
        """Leave all tensors whose names begin with a prefix."""
        self._left -= {name for name in self._left if name.startswith(prefix)}

    def check_all_taken(self) -> None:
        """Refuse weights that hold more than the model asked for.

        Raises:
            ModelError: Names the first tensors left over, with their shapes.
        """
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

    def _read_into(self, name: str, place: torch.Tensor) -> None:
        stored = self._weights.stored_matrix(name)
        if stored is not None:
            read_into(self._weights, stored, place)
            return
        dtype_name = self._weights.info(name).dtype_name
        if dtype_name in BLOCK_TYPES:
            dequantize_into(self._weights.load_packed(name), dtype_name, place)
            return
        values = self._weights.load(name)
        if dtype_name in ("bf16", "mxfp4"):
            place.copy_(torch.from_numpy(values.view(np.int16)).view(torch.bfloat16))
        elif dtype_name in FP8_DTYPES:
            place.copy_(torch.from_numpy(values).view(FP8_DTYPES[dtype_name]))
        elif values.dtype.kind == "f":
            place.copy_(torch.from_numpy(values))
        else:
            raise ModelError(f"{self._directory}: tensor {name} holds {values.dtype}, not floating-point numbers", param=name)


def _text(shape: tuple[int, ...]) -> str:
    return str(list(shape))
