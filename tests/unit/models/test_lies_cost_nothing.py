"""Goal: whatever sizes a file claims, it is refused before memory of that size is asked for.

Method: each lie is told with the allocator watched. A real allocation of what is claimed would fail or be seen.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from headrace.errors import ModelError
from headrace.models.config_fields import SIZES_MAX
from headrace.models.description import describe
from headrace.models.gguf_convert import write_hf_files
from headrace.models.weights import open_weights

HUGE = 1 << 40
ALLOWED_BYTES = 4 << 20


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < ALLOWED_BYTES, f"{peak} bytes were taken"


def safetensors(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


SAFETENSORS = {
    "header": HUGE.to_bytes(8, "little") + b"{}",
    "shape": safetensors({"x": {"dtype": "F32", "shape": [HUGE, 4], "data_offsets": [0, 16]}}, bytes(16)),
    "place": safetensors({"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}, bytes(16)),
    "packed shape": safetensors(
        {
            "m.weight_packed": {"dtype": "I32", "shape": [2, 1], "data_offsets": [0, 8]},
            "m.weight_scale": {"dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]},
            "m.weight_shape": {"dtype": "I64", "shape": [2], "data_offsets": [12, 28]},
        },
        bytes(12) + struct.pack("<2q", 2, HUGE),
    ),
}


@pytest.mark.parametrize("lie", SAFETENSORS)
def test_safetensors(lie, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS[lie])
    group = {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with little_memory(), pytest.raises(ModelError):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "absent.safetensors"])
def test_shard_index(name, tmp_path):
    content = safetensors({"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}, bytes(16))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(content)
    index = {"metadata": {"total_size": HUGE}, "weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with little_memory(), pytest.raises(ModelError):
        open_weights(tmp_path)


GGUF = {
    "tensors": lambda builder: setattr(builder, "num_tensors", HUGE),
    "metadata": lambda builder: setattr(builder, "num_entries", HUGE),
    "shape": lambda builder: builder.add("blk.0.attn_v.weight", (HUGE, 32), "Q4_0", bytes(18)),
    "place": lambda builder: builder.add("output.weight", (8,), "F32", bytes(32), offset=HUGE),
    "layers": lambda builder: builder.metadata.update({"llama.block_count": (1 << 32) - 1}),
    "array": lambda builder: builder.metadata.update({"x": builder.raw(struct.pack("<IIQ", 9, 4, HUGE))}),
    "strings": lambda builder: builder.metadata.update({"x": builder.raw(struct.pack("<IIQ", 9, 8, HUGE))}),
}


@pytest.mark.parametrize("lie", GGUF)
def test_gguf(lie, llama_builder, raw_value, tmp_path):
    llama_builder.raw = raw_value
    GGUF[lie](llama_builder)
    path = llama_builder.write(tmp_path / "a.gguf")
    with little_memory(), pytest.raises(ModelError):
        write_hf_files(path, tmp_path)


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "max_position_embeddings", "hidden_size", "head_dim"])
def test_sizes_of_a_config(field, llama_builder, tmp_path):
    path = llama_builder.write(tmp_path / "a.gguf")
    write_hf_files(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: (1 << 31) - 1}))
    message = rf"config\.json: {field} is 2147483647, not a whole number from 1 to {SIZES_MAX[field]}; pull the model again"
    with little_memory(), pytest.raises(ModelError, match=message):
        describe(tmp_path)


def test_layers_that_the_weights_do_not_have(llama_builder, tmp_path):
    path = llama_builder.write(tmp_path / "a.gguf")
    write_hf_files(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1024}))
    with little_memory(), pytest.raises(ModelError, match="weights lack layer 2 of 1024"):
        describe(tmp_path)
