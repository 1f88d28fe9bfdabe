"""Small weight files, written by the libraries that define the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[[Mapping[str, tuple[str, np.ndarray]]], Path]:
    """Write a GGUF file of a llama with four heads over two: name → type name and values, or packed rows for a quantised type."""

    def write(tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
        writer = GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        for name, (type_name, values) in tensors.items():
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType[type_name.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices here are small: they are read in as many runs of rows as there can be."""
    monkeypatch.setattr("services.worker.row_runs._RUN_VALUES", 1)
