"""A model directory's weights under their Hugging Face names, whatever file format holds them.

`open_weights` reads headers only; `Weights.load` reads one tensor. Nothing here knows torch: arrays are numpy, and what numpy lacks
is raw bits under a dtype name (`bf16`, `f8_e4m3`, `f8_e5m2`). A matrix that a quantised safetensors checkpoint stores as several
tensors is one here, and says what it is made of. Used by the worker to load and by `headrace models show` to count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.gguf_architectures import architecture_of, restore_row_order, rows_per_head
from headrace.models.gguf_file import GgufFile
from headrace.models.json_file import read_json_object
from headrace.models.model_config import CONFIG_FILE
from headrace.models.quantization_config import read_scheme
from headrace.models.quantized_layout import StoredMatrix, group_tensors
from headrace.models.safetensors_file import SINGLE_FILE, SafetensorsFile, shard_files
from headrace.models.tensor_info import TensorInfo


class Weights(ABC):
    """Open weights of one model directory."""

    @property
    @abstractmethod
    def metadata(self) -> Mapping[str, Any]:
        """The weight files' own metadata: GGUF keys, or safetensors `__metadata__`."""

    @abstractmethod
    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in file order. A tied output projection is not among them."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Describe a tensor.

        Raises:
            ModelError: There is no such tensor.
        """

    def stored_matrix(self, name: str) -> StoredMatrix | None:
        """What a matrix of several tensors is made of; None for a tensor that is stored as it is."""
        return None

    def stored_info(self, name: str) -> TensorInfo:
        """Describe a tensor or a part of a stored matrix, as it is stored.

        Raises:
            ModelError: There is no such tensor.
        """
        return self.info(name)

    @abstractmethod
    def load(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor, or a part of a stored matrix, into fresh, writable, contiguous memory.

        Returns:
            float32 for `f32` and for every GGUF quantisation, float16 for `f16`, raw uint16 for `bf16` and for `mxfp4`, which fits
            into it, raw uint8 for eight-bit floats, integers as stored.

        Raises:
            ModelError: There is no such tensor, or its type is not supported.
        """

    def load_item(self, name: str, index: int) -> npt.NDArray[Any]:
        """Read one item along a tensor's first dimension, in the form of `load`.

        Raises:
            ModelError: As for `load`.
        """
        item: npt.NDArray[Any] = self.load(name)[index]
        return item

    @abstractmethod
    def load_packed(self, name: str, rows: slice = slice(None)) -> npt.NDArray[np.uint8]:
        """Read a tensor's bytes as stored, all or those of some rows, into memory of their own.

        Args:
            name: The tensor.
            rows: Which rows, without a step. A row is what lies along the last dimension; of one dimension there is one row.

        Returns:
            `[num_rows, bytes_per_row]`, rows in Hugging Face order.

        Raises:
            ModelError: As for `load`.
        """

    def reads_by_rows(self, name: str) -> bool:
        """Whether some rows of a tensor are read without all the others."""
        return True


class _GgufWeights(Weights):
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._architecture = architecture_of(file)
        self._gguf_names = self._architecture.hf_tensor_names(file)
        # At once, so that a start fails before it has loaded half a model.
        file.check_types(self._gguf_names.values())

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._file.metadata

    def names(self) -> list[str]:
        return list(self._gguf_names)

    def info(self, name: str) -> TensorInfo:
        tensor = self._file.tensors[self._gguf_name(name)]
        return TensorInfo(name=name, shape=tensor.shape, dtype_name=tensor.type_name.lower())

    def load(self, name: str) -> npt.NDArray[Any]:
        gguf_name = self._gguf_name(name)
        return self._file.unpack(gguf_name, self.load_packed(name))

    def load_packed(self, name: str, rows: slice = slice(None)) -> npt.NDArray[np.uint8]:
        gguf_name = self._gguf_name(name)
        num_heads = self._architecture.num_interleaved_heads(self._file, gguf_name)
        if num_heads is not None:
            return self._heads_in_hf_order(gguf_name, num_heads, rows)
        packed = self._file.packed(gguf_name, rows)
        offset = self._architecture.offset_of(gguf_name)
        if offset:
            self._check_offset_is_exact(gguf_name)
            values = packed.view("<f4")
            values -= np.float32(offset)
        return packed

    def _heads_in_hf_order(self, gguf_name: str, num_heads: int, rows: slice) -> npt.NDArray[np.uint8]:
        num_rows = self._file.tensors[gguf_name].num_rows
        head_dim = rows_per_head(num_rows, num_heads)
        first, last, _ = rows.indices(num_rows)
        # Rows change places inside their heads only: the heads that the rows are of are read whole.
        start = first // head_dim * head_dim
        heads = self._file.packed(gguf_name, slice(start, -(-last // head_dim) * head_dim))
        return restore_row_order(heads, num_heads=len(heads) // head_dim)[first - start : last - start]

    def _gguf_name(self, name: str) -> str:
        if name not in self._gguf_names:
            raise ModelError(f"{self._file.path}: has no tensor {name}; the model is incomplete or of another kind: pull it again")
        return self._gguf_names[name]

    def _check_offset_is_exact(self, gguf_name: str) -> None:
        type_name = self._file.tensors[gguf_name].type_name
        if type_name != "F32":
            # Taking 1 off what was rounded after it was added would leave few digits.
            raise ModelError(f"{self._file.path}: tensor {gguf_name} is {type_name}; norms are read as F32 only: take another file")


class _SafetensorsWeights(Weights):
    def __init__(self, files: Mapping[str, SafetensorsFile], directory: Path) -> None:
        self._files = files
        self._directory = directory
        self._matrices, self._parts = self._group()

    @property
    def metadata(self) -> Mapping[str, Any]:
        merged: dict[str, Any] = {}
        for file in self._files.values():
            merged |= file.metadata
        return merged

    def names(self) -> list[str]:
        return [name for name in self._files if name not in self._parts] + list(self._matrices)

    def info(self, name: str) -> TensorInfo:
        matrix = self._matrices.get(name)
        if matrix is not None:
            return TensorInfo(name=name, shape=matrix.shape, dtype_name=matrix.dtype_name)
        return self.stored_info(name)

    def stored_matrix(self, name: str) -> StoredMatrix | None:
        return self._matrices.get(name)

    def load(self, name: str) -> npt.NDArray[Any]:
        return self._file(name).load(name)

    def load_item(self, name: str, index: int) -> npt.NDArray[Any]:
        return self._file(name).load_item(name, index)

    def load_packed(self, name: str, rows: slice = slice(None)) -> npt.NDArray[np.uint8]:
        return self._file(name).packed(name, rows)

    def stored_info(self, name: str) -> TensorInfo:
        tensor = self._file(name).tensors[name]
        return TensorInfo(name=name, shape=tensor.shape, dtype_name=tensor.dtype_name)

    def _group(self) -> tuple[dict[str, StoredMatrix], set[str]]:
        config_path = self._directory / CONFIG_FILE
        config = read_json_object(config_path) if config_path.is_file() else {}
        stored = {name: self.stored_info(name) for name in self._files}
        try:
            return group_tensors(stored, read_scheme(config), self.load)
        except ModelError as error:
            raise ModelError(f"{self._directory}: {error.message}", param=error.param) from error

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise ModelError(f"{self._directory}: has no tensor {name}; the model is incomplete or of another kind: pull it again")
        return self._files[name]


def open_weights(directory: Path) -> Weights:
    """Open the weights of a model directory: sharded or single safetensors, else the one GGUF file.

    Raises:
        ModelError: There are none, or they are damaged or unsupported; the message says what to do.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: not a model directory; get one with `headrace models pull <name>`")
    shards = shard_files(directory)
    if shards is not None:
        return _open_shards(shards, directory)
    single = directory / SINGLE_FILE
    if single.is_file():
        file = SafetensorsFile(single)
        return _SafetensorsWeights(dict.fromkeys(file.tensors, file), directory)
    gguf_path = gguf_file_in(directory)
    if gguf_path is not None:
        return _GgufWeights(GgufFile(gguf_path))
    if any(directory.glob("*.bin")):
        raise ModelError(f"{directory}: has pickled weights (*.bin) only, which are never read; take a model with safetensors")
    raise ModelError(f"{directory}: has no weights (model.safetensors or one .gguf); pull the model again")


def gguf_file_in(directory: Path) -> Path | None:
    """Give the one GGUF file of a directory, None without one.

    Raises:
        ModelError: There are several.
    """
    found = sorted(directory.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{directory}: has several GGUF files ({names}); keep one, and join the parts of a split one")
    return found[0] if found else None


def _open_shards(shards: Mapping[str, Path], directory: Path) -> Weights:
    opened = {path: SafetensorsFile(path) for path in sorted(set(shards.values()))}
    files: dict[str, SafetensorsFile] = {}
    for name, path in shards.items():
        if name not in opened[path].tensors:
            raise ModelError(f"{directory}: the index says that {name} is in {path.name}, which lacks it; pull the model again")
        files[name] = opened[path]
    return _SafetensorsWeights(files, directory)
