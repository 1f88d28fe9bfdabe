"""Reader of the GGUF container: metadata, tensor table, and one tensor's blocks at a time.

The file is mapped, never read whole. Every count, length and offset is checked against the size of the file before anything is
allocated for it, so a file that lies about its sizes costs nothing but an error. Lists of strings (a vocabulary has a hundred
thousand) are stepped over and decoded when they are asked for: who loads weights never does. What the tensors mean (names, row
order) is not known here: see `gguf_architectures.py`.

Source: the format's description in ggml, docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.mapped_file import MappedFile

GgufValue = bool | int | float | str | list[Any]
"""One metadata value; arrays become lists."""

TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
"""Tensor types that can be loaded, by their number in the file: GGUF name, values a block, bytes a block."""

SUPPORTED_TYPES: Final = tuple(name for name, _, _ in TYPES.values())
"""Tensor types that can be loaded, by their GGUF names."""

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_ALIGNMENT_DEFAULT: Final = 32
_ALIGNMENT_MAX: Final = 1 << 20
_NUM_DIMS_MAX: Final = 4
_NESTING_MAX: Final = 4
_NAME_BYTES_MAX: Final = 64 * 1024
_MIN_METADATA_ENTRY_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_ENTRY_BYTES: Final = 8 + 4 + 4 + 8

# Metadata value types of the format: number → numpy type; string and array are read apart.
_SCALARS: Final[Mapping[int, str]] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING: Final = 8
_ARRAY: Final = 9

_LENGTH: Final = struct.Struct("<Q")
_CHUNK_BLOCKS: Final = 16384


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table.

    Attributes:
        name: The file's own name, for example `blk.0.attn_q.weight`.
        shape: Row-major shape, outermost dimension first (the file stores it the other way round).
        type_name: GGUF type name, or `type <n>` for a number that this reader does not know.
        offset: First byte, from the start of the file.
        num_bytes: Size in the file; 0 for a type that this reader does not know.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of values, whatever their type."""
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Number of rows; a row is what lies along the last dimension."""
        return self.num_elements // self.shape[-1]


class GgufFile:
    """An open GGUF file.

    Args:
        path: The file.

    Raises:
        ModelError: The file is not GGUF, is truncated, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path, kind="GGUF")
        header = _HeaderReader(self._mapped.data, path)
        self.metadata: Mapping[str, GgufValue]
        self.tensors: Mapping[str, GgufTensor]
        self.metadata, self.tensors = header.read()

    def packed(self, name: str, rows: slice = slice(None)) -> npt.NDArray[np.uint8]:
        """Read a tensor's rows, or some of them, as they lie in the file: `[num_rows, bytes_per_row]` in memory of their own."""
        tensor = self.tensors[name]
        self.check_types([name])
        bytes_per_row = tensor.num_bytes // tensor.num_rows
        first, last, _ = rows.indices(tensor.num_rows)
        copied = self._mapped.copy(tensor.offset + first * bytes_per_row, (last - first) * bytes_per_row)
        return copied.reshape(last - first, bytes_per_row)

    def check_types(self, names: Iterable[str]) -> None:
        """Refuse tensors whose types cannot be loaded.

        Raises:
            ModelError: Names every such type among these tensors.
        """
        found = {self.tensors[name].type_name for name in names} - set(SUPPORTED_TYPES)
        if found:
            unsupported, supported = ", ".join(sorted(found)), ", ".join(SUPPORTED_TYPES)
            raise ModelError(f"{self.path}: tensor types not supported: {unsupported}; take a quantisation among {supported}")

    def unpack(self, name: str, rows: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Turn packed rows of a tensor into numbers of the tensor's shape, in memory of their own.

        Args:
            name: The tensor whose type and shape apply.
            rows: `[num_rows, bytes_per_row]`, from `packed`, in any row order.

        Returns:
            float32, float16, or for BF16 the raw uint16 halves; quantised types come back as float32.
        """
        tensor = self.tensors[name]
        if tensor.type_name == "F32":
            values: npt.NDArray[Any] = np.array(rows).view("<f4")
        elif tensor.type_name == "F16":
            values = np.array(rows).view("<f2")
        elif tensor.type_name == "BF16":
            values = np.array(rows).view("<u2")
        else:
            values = _dequantize(rows, tensor.type_name)
        return values.reshape(tensor.shape)


def _unsupported_type(kind: int) -> tuple[str, int, int] | None:
    """Name and sizes of a type that exists but cannot be loaded; None for a number that the gguf library does not know either."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        return None
    return known.name, *GGML_QUANT_SIZES[known]


def _dequantize(rows: npt.NDArray[np.uint8], type_name: str) -> npt.NDArray[np.float32]:
    """Unpack blocks in large chunks; the library's own function takes 16 rows at a time and holds all results twice."""
    # The library is large, and whoever loads common types only does without it.
    from gguf import quants

    block_size, block_bytes = next(sizes for name, *sizes in TYPES.values() if name == type_name)
    unpack = getattr(quants, type_name).dequantize_blocks
    blocks = rows.reshape(-1, block_bytes)
    values = np.empty((blocks.shape[0], block_size), dtype=np.float32)
    for first in range(0, blocks.shape[0], _CHUNK_BLOCKS):
        chunk = slice(first, first + _CHUNK_BLOCKS)
        values[chunk] = unpack(blocks[chunk])
    return values


@dataclass(frozen=True, slots=True)
class _Strings:
    """A list of strings that was stepped over; `first` is where its first length stands in the file."""

    first: int
    count: int


class _Metadata(Mapping[str, GgufValue]):
    """Metadata by key; lists of strings are decoded when they are asked for."""

    def __init__(self, values: dict[str, GgufValue | _Strings], reader: _HeaderReader) -> None:
        self._values = values
        self._reader = reader

    def __getitem__(self, key: str) -> GgufValue:
        value = self._values[key]
        if isinstance(value, _Strings):
            value = self._values[key] = self._reader.strings(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _HeaderReader:
    """Walks the header once, with a cursor that cannot leave the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._size = len(data)
        self._at = 0

    def read(self) -> tuple[_Metadata, dict[str, GgufTensor]]:
        if self._take(4) != _MAGIC:
            raise self._bad("does not start with the GGUF magic")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise self._bad(f"has version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]}, little-endian, are read")
        num_tensors = self._number("<Q")
        num_entries = self._number("<Q")
        self._check_count("tensors", num_tensors, _MIN_TENSOR_ENTRY_BYTES)
        self._check_count("metadata entries", num_entries, _MIN_METADATA_ENTRY_BYTES)
        values: dict[str, GgufValue | _Strings] = {}
        for _ in range(num_entries):
            key = self._string(_NAME_BYTES_MAX)
            if key in values:
                raise self._bad(f"has the metadata key {key!r} twice")
            kind = self._number("<I")
            values[key] = self._skip_strings() if self._is_list_of_strings(kind) else self._value(kind, nesting=0)
        metadata = _Metadata(values, self)
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        return metadata, self._place(entries, self._alignment(metadata))

    def strings(self, place: _Strings) -> list[Any]:
        """Decode a list that was stepped over."""
        self._at = place.first
        return [self._string() for _ in range(place.count)]

    def _bad(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: corrupt or not a GGUF file: it {what}; pull the model again")

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._size - self._at:
            raise self._bad(f"ends at byte {self._size}, inside its header, which needs {num_bytes} bytes from {self._at} on")
        start = self._at
        self._at += num_bytes
        return self._data[start : self._at]

    def _number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _check_count(self, what: str, count: int, min_bytes_each: int) -> None:
        left = self._size - self._at
        if count * min_bytes_each > left:
            raise self._bad(f"claims {count} {what}, more than the {left} bytes that follow can hold")

    def _string(self, max_bytes: int | None = None) -> str:
        num_bytes = self._number("<Q")
        if max_bytes is not None and num_bytes > max_bytes:
            raise self._bad(f"has a name of {num_bytes} bytes; at most {max_bytes} are allowed")
        try:
            return self._take(num_bytes).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(f"has a string that is not UTF-8 before byte {self._at}") from error

    def _is_list_of_strings(self, kind: int) -> bool:
        return kind == _ARRAY and self._data[self._at : self._at + 4] == _STRING.to_bytes(4, "little")

    def _skip_strings(self) -> _Strings:
        """Step over a list of strings, checking only that each of them lies in the file."""
        self._take(4)
        count = self._number("<Q")
        self._check_count("array items", count, _LENGTH.size)
        first = at = self._at
        data, last_start = self._data, self._size - _LENGTH.size
        for _ in range(count):
            if at > last_start:
                break
            at += _LENGTH.size + _LENGTH.unpack_from(data, at)[0]
        else:
            if at <= self._size:
                self._at = at
                return _Strings(first, count)
        raise self._bad(f"ends at byte {self._size}, inside a list of {count} strings that starts at {first}")

    def _value(self, kind: int, *, nesting: int) -> GgufValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(nesting)
        layout = _SCALARS.get(kind)
        if layout is None:
            raise self._bad(f"has a metadata value of unknown type {kind}")
        dtype = np.dtype(layout)
        scalar: bool | int | float = np.frombuffer(self._take(dtype.itemsize), dtype=dtype)[0].item()
        return scalar

    def _array(self, nesting: int) -> list[Any]:
        if nesting >= _NESTING_MAX:
            raise self._bad(f"nests metadata arrays more than {_NESTING_MAX} deep")
        kind = self._number("<I")
        count = self._number("<Q")
        layout = _SCALARS.get(kind)
        if layout is not None:
            dtype = np.dtype(layout)
            self._check_count("array items", count, dtype.itemsize)
            items: list[Any] = np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype).tolist()
            return items
        # A string costs at least its length, an inner array its type and length.
        self._check_count("array items", count, 8)
        return [self._value(kind, nesting=nesting + 1) for _ in range(count)]

    def _alignment(self, metadata: Mapping[str, GgufValue]) -> int:
        alignment = metadata.get("general.alignment", _ALIGNMENT_DEFAULT)
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or not 0 < alignment <= _ALIGNMENT_MAX
            or alignment % 8 != 0
        ):
            raise self._bad(f"has general.alignment {alignment!r}, not a multiple of 8 up to {_ALIGNMENT_MAX}")
        return alignment

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_NAME_BYTES_MAX)
        num_dims = self._number("<I")
        if not 1 <= num_dims <= _NUM_DIMS_MAX:
            raise self._bad(f"has tensor {name} with {num_dims} dimensions; 1 to {_NUM_DIMS_MAX} are allowed")
        dims = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims))
        if 0 in dims:
            raise self._bad(f"has tensor {name} with an empty dimension: {list(reversed(dims))}")
        return name, tuple(reversed(dims)), self._number("<I"), self._number("<Q")

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        """Turn relative offsets into absolute ones, and check that each tensor lies in the file and in no other tensor."""
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._bad(f"has the tensor {name} twice")
            if offset % alignment:
                raise self._bad(f"has tensor {name} at offset {offset}, not a multiple of its alignment {alignment}")
            tensors[name] = self._tensor(name, shape, kind, offset=start + offset)
        end = start
        for tensor in sorted(tensors.values(), key=lambda each: each.offset):
            if tensor.offset < end:
                raise self._bad(f"has tensor {tensor.name} inside another tensor")
            end = tensor.offset + tensor.num_bytes
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, *, offset: int) -> GgufTensor:
        known = TYPES.get(kind) or _unsupported_type(kind)
        if known is None:
            # The tensor may never be asked for; loading it says what is wrong.
            return GgufTensor(name=name, shape=shape, type_name=f"type {kind}", offset=offset, num_bytes=0)
        type_name, block_size, block_bytes = known
        if shape[-1] % block_size:
            raise self._bad(f"has tensor {name} with rows of {shape[-1]} values; {type_name} packs {block_size} at a time")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if num_bytes > self._size - offset:
            raise self._bad(f"ends at byte {self._size}, but tensor {name} needs {num_bytes} bytes from {offset} on")
        return GgufTensor(name=name, shape=shape, type_name=type_name, offset=offset, num_bytes=num_bytes)
