"""Goal: unpacking into place gives the very bits of unpacking to float32 with the gguf library and converting afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import save_file

from services.worker import dequantize as ours
from services.worker.weights import WeightLoader

SCALE_FIELDS = {"q4_0": 1, "q4_1": 2, "q8_0": 1}


def random_rows(dtype_name: str, *, num_rows: int, blocks_per_row: int) -> np.ndarray:
    """Packed rows with finite scales of all sizes, subnormal ones included, and random values."""
    num_bytes = ours.BLOCK_TYPES[dtype_name][0]
    generator = np.random.default_rng(num_rows)
    blocks = generator.integers(0, 256, (num_rows * blocks_per_row, num_bytes), dtype=np.uint8)
    scales = generator.standard_normal((len(blocks), SCALE_FIELDS[dtype_name])) * 10.0 ** generator.integers(
        -7, 3, (len(blocks), 1)
    )
    blocks[:, : 2 * scales.shape[1]] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype_name", ours.BLOCK_TYPES)
@pytest.mark.parametrize(("num_rows", "blocks_per_row"), [(1, 1), (7, 3), (48, 2000)])
def test_bits_are_those_of_the_gguf_library(dtype_name: str, dtype: torch.dtype, num_rows: int, blocks_per_row: int) -> None:
    rows = random_rows(dtype_name, num_rows=num_rows, blocks_per_row=blocks_per_row)
    out = torch.full((num_rows, blocks_per_row * ours.BLOCK_SIZE), float("nan"), dtype=dtype)
    ours.dequantize_into(rows, dtype_name, out)
    expected = torch.from_numpy(dequantize(rows, GGMLQuantizationType[dtype_name.upper()])).to(dtype)
    assert torch.equal(out, expected)


def test_stacked_tensors_keep_their_order_and_values(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    tensors = {name: generator.normal(size=(rows, 6)).astype(kind) for name, rows, kind in (("b", 3, "f4"), ("a", 5, "f2"))}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = WeightLoader(tmp_path, dtype=torch.bfloat16)
    stacked = weights.take_stacked([("b", (3, 6)), ("a", (5, 6))])
    expected = torch.cat([torch.from_numpy(tensors[name]).to(torch.bfloat16) for name in ("b", "a")])
    assert torch.equal(stacked, expected)
    assert weights.num_bytes == expected.nbytes
    weights.check_all_taken()


def test_parts_may_be_loaded_side_by_side(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    tensors = {f"t{index}": generator.normal(size=(40, 30)).astype(np.float32) for index in range(60)}
    save_file(tensors, tmp_path / "model.safetensors")
    with ThreadPoolExecutor(4) as pool:
        weights = WeightLoader(tmp_path, dtype=torch.float32, map_parts=pool.map)
        loaded = list(weights.map(lambda name: weights.take(name, (40, 30)), tensors))
    assert all(torch.equal(ours, torch.from_numpy(values)) for ours, values in zip(loaded, tensors.values(), strict=True))
    assert weights.num_bytes == sum(values.nbytes for values in tensors.values())
    weights.check_all_taken()
