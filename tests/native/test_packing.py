"""Goal: a matrix that is packed in runs of rows is the one that is packed at once, byte for byte.

Method: each kind of stored matrix, with a last run that ends inside a panel, is packed with runs of one panel and as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import save_file

from services.worker.layers.native_packing import pack_matrix
from services.worker.weights import WeightLoader

SHAPE = (80, 256)
NAME = "model.layers.0.mlp.up_proj.weight"


def write_gguf(directory: Path, type_name: str) -> None:
    generator = np.random.default_rng(1)
    writer = GGUFWriter(directory / "model.gguf", "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    kind = GGMLQuantizationType[type_name]
    if type_name == "Q4_K":
        # The library does not quantise to it. Small factors, so that all values are finite.
        rows = generator.integers(0, 256, (SHAPE[0], 144), dtype=np.uint8)
        rows[:, :4] = np.frombuffer(np.array([0.01, 0.02], np.float16).tobytes(), np.uint8)
    else:
        rows = quantize(generator.standard_normal(SHAPE).astype(np.float32), kind)
    writer.add_tensor("blk.0.ffn_up.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_plain(directory: Path, dtype: torch.dtype) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
    save_file({NAME: values}, directory / "model.safetensors")


def write_awq(directory: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    num_rows, num_columns = SHAPE
    prefix = NAME.removesuffix(".weight")

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    tensors = {
        f"{prefix}.qweight": words(num_columns, num_rows // 8),
        f"{prefix}.qzeros": words(num_columns // 64, num_rows // 8),
        f"{prefix}.scales": torch.rand((num_columns // 64, num_rows), generator=generator).to(torch.float16),
    }
    save_file(tensors, directory / "model.safetensors")
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}}
    (directory / "config.json").write_text(json.dumps(config))


WRITERS: dict[str, Callable[[Path], None]] = {
    "bfloat16": lambda directory: write_plain(directory, torch.bfloat16),
    "float16": lambda directory: write_plain(directory, torch.float16),
    "Q4_1": lambda directory: write_gguf(directory, "Q4_1"),
    "Q8_0": lambda directory: write_gguf(directory, "Q8_0"),
    "Q4_K": lambda directory: write_gguf(directory, "Q4_K"),
    "AWQ": write_awq,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_runs_of_rows_are_packed_as_the_whole(kind: str, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[kind](tmp_path)

    def pack() -> Any:
        return pack_matrix(library, WeightLoader(tmp_path, dtype=torch.bfloat16), NAME, SHAPE)

    whole = pack()
    monkeypatch.setattr("services.worker.row_runs._RUN_VALUES", 1)
    in_runs = pack()
    assert (in_runs.out_features, in_runs.in_features) == (whole.out_features, whole.in_features) == SHAPE
    assert len(in_runs.segments) == 1
    for name in ("format", "n", "k", "group", "half_scales", "has_minimums", "zero", "out_offset"):
        assert getattr(in_runs.segments[0], name) == getattr(whole.segments[0], name)
    assert np.array_equal(in_runs.arrays[0], whole.arrays[0])
    assert in_runs.arrays[0].any()
