"""Reader of safetensors files, one or sharded, without the framework-bound library.

A file is: header length (8 bytes, little-endian), JSON header, then the data. The header is bounded and each tensor's place is
checked against the file before anything is allocated. What numpy lacks is read as raw bits with a tag: bfloat16 as uint16 (`bf16`),
eight-bit floats as uint8 (`f8_e4m3`, `f8_e5m2`).

Source: the format's description, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.mapped_file import MappedFile

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_HEADER_BYTES_MAX: Final = 100_000_000
_INDEX_BYTES_MAX: Final = 100_000_000
_LENGTH_BYTES: Final = 8
_NUM_DIMS_MAX: Final = 8

# The file's type name → our dtype name and how numpy reads it.
_DTYPES: Final[Mapping[str, tuple[str, str]]] = {
    "F64": ("f64", "<f8"),
    "F32": ("f32", "<f4"),
    "F16": ("f16", "<f2"),
    "BF16": ("bf16", "<u2"),
    "F8_E4M3": ("f8_e4m3", "<u1"),
    "F8_E5M2": ("f8_e5m2", "<u1"),
    "I64": ("i64", "<i8"),
    "I32": ("i32", "<i4"),
    "I16": ("i16", "<i2"),
    "I8": ("i8", "<i1"),
    "U8": ("u8", "<u1"),
    "BOOL": ("bool", "?"),
}


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One entry of the header: shape, our dtype name, and the bytes' place from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype_name: str
    numpy_dtype: str
    offset: int
    num_bytes: int


class SafetensorsFile:
    """One open safetensors file.

    Raises:
        ModelError: The file is truncated, contradicts itself, or has a type that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path, kind="safetensors")
        header, data_start = self._read_header()
        raw_metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = dict(raw_metadata) if isinstance(raw_metadata, dict) else {}
        self.tensors: dict[str, SafetensorsTensor] = {
            name: self._read_entry(name, entry, data_start) for name, entry in header.items()
        }
        self._check_layout(data_start)

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor into memory of its own."""
        tensor = self.tensors[name]
        return self._mapped.copy(tensor.offset, tensor.num_bytes).view(tensor.numpy_dtype).reshape(tensor.shape)

    def load_item(self, name: str, index: int) -> npt.NDArray[Any]:
        """Read one item along a tensor's first dimension into memory of its own."""
        tensor = self.tensors[name]
        num_items, *shape = tensor.shape
        num_bytes = tensor.num_bytes // num_items
        return self._mapped.copy(tensor.offset + index * num_bytes, num_bytes).view(tensor.numpy_dtype).reshape(shape)

    def packed(self, name: str, rows: slice = slice(None)) -> npt.NDArray[np.uint8]:
        """Read a tensor's rows, or some of them, as they lie in the file: `[num_rows, bytes_per_row]` in memory of their own."""
        tensor = self.tensors[name]
        num_rows = math.prod(tensor.shape[:-1])
        bytes_per_row = tensor.num_bytes // max(1, num_rows)
        first, last, _ = rows.indices(num_rows)
        copied = self._mapped.copy(tensor.offset + first * bytes_per_row, (last - first) * bytes_per_row)
        return copied.reshape(last - first, bytes_per_row)

    def _bad(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: corrupt or not a safetensors file: {what}; pull the model again")

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = len(self._mapped)
        if size < _LENGTH_BYTES:
            raise self._bad(f"it has {size} bytes")
        num_bytes = int.from_bytes(self._mapped.data[:_LENGTH_BYTES], "little")
        if num_bytes > min(_HEADER_BYTES_MAX, size - _LENGTH_BYTES):
            raise self._bad(f"it claims a header of {num_bytes} bytes; the file has {size}")
        try:
            header = json.loads(self._mapped.data[_LENGTH_BYTES : _LENGTH_BYTES + num_bytes])
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        return header, _LENGTH_BYTES + num_bytes

    def _read_entry(self, name: str, entry: Any, data_start: int) -> SafetensorsTensor:
        if not isinstance(entry, dict):
            raise self._bad(f"tensor {name} has no description")
        dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not _are_sizes(shape) or len(shape) > _NUM_DIMS_MAX:
            raise self._bad(f"tensor {name} has shape {shape!r}")
        if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
            raise self._bad(f"tensor {name} has data_offsets {place!r}")
        known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
        if known is None:
            raise ModelError(f"{self.path}: tensor {name} has type {dtype!r}; supported are {', '.join(_DTYPES)}")
        dtype_name, numpy_dtype = known
        num_bytes = place[1] - place[0]
        needed = math.prod(shape) * np.dtype(numpy_dtype).itemsize
        if num_bytes != needed:
            raise self._bad(f"tensor {name} of shape {shape} and type {dtype} needs {needed} bytes but has {num_bytes}")
        if data_start + place[1] > len(self._mapped):
            raise self._bad(f"tensor {name} ends at byte {data_start + place[1]}, the file at {len(self._mapped)}")
        return SafetensorsTensor(name, tuple(shape), dtype_name, numpy_dtype, data_start + place[0], num_bytes)

    def _check_layout(self, data_start: int) -> None:
        """The format allows neither holes nor overlaps; both are signs of a file that was cut or tampered with."""
        end = data_start
        for tensor in sorted(self.tensors.values(), key=lambda each: (each.offset, each.num_bytes)):
            if tensor.offset != end:
                raise self._bad(f"tensor {tensor.name} starts at byte {tensor.offset}, the one before ends at {end}")
            end = tensor.offset + tensor.num_bytes
        if end != len(self._mapped):
            raise self._bad(f"its tensors end at byte {end}, the file at {len(self._mapped)}")


def shard_files(directory: Path) -> dict[str, Path] | None:
    """Map each tensor to the shard that holds it, by the index file; None when there is no index.

    Raises:
        ModelError: The index is damaged, points out of the directory, or names a file that is missing.
    """
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        return None
    try:
        if index_path.stat().st_size > _INDEX_BYTES_MAX:
            raise ModelError(f"{index_path}: larger than {_INDEX_BYTES_MAX} bytes; pull the model again")
        index = json.loads(index_path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{index_path}: not a shard index: {error}; pull the model again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path}: has no weight_map; pull the model again")
    files: dict[str, Path] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ModelError(f"{index_path}: tensor {name} is said to be in {file_name!r}, not a file beside the index")
        files[name] = directory / file_name
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    if missing:
        raise ModelError(f"{directory}: weight files are missing: {', '.join(missing)}; pull the model again")
    return files


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value)
