"""safetensors, single and sharded: against files written by the format's own library, and files that lie."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from headrace.errors import ModelError
from headrace.models.safetensors_file import INDEX_FILE, SafetensorsFile
from headrace.models.tensor_info import TensorInfo
from headrace.models.weights import open_weights


def raw_file(header: Any, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_bytes is None else header_bytes
    return length.to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def test_tensors_of_the_library_are_read_back(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal((2, 2)).astype(np.float16),
        "c": np.arange(5, dtype=np.int64),
        "d": np.array(2.5, dtype=np.float32),
        "e": np.zeros((0, 4), dtype=np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = open_weights(tmp_path)

    assert set(weights.names()) == set(tensors)
    assert weights.metadata == {"format": "pt"}
    assert weights.info("b") == TensorInfo(name="b", shape=(2, 2), dtype_name="f16")
    for name, expected in tensors.items():
        loaded = weights.load(name)
        assert loaded.dtype == expected.dtype
        assert np.array_equal(loaded, expected)
        assert loaded.flags.writeable
    assert weights.load_packed("a").tobytes() == tensors["a"].tobytes()
    assert weights.load_packed("a").shape == (3, 16)


def test_bfloat16_is_raw_halves_with_a_tag(tmp_path):
    data = np.array([0x3F80, 0xC000], dtype="<u2")
    (tmp_path / "model.safetensors").write_bytes(raw_file({"x": entry("BF16", [2], [0, 4])}, data.tobytes()))
    weights = open_weights(tmp_path)

    assert weights.info("x").dtype_name == "bf16"
    loaded = weights.load("x")
    assert loaded.dtype == np.uint16
    assert (loaded.astype("<u4") << 16).view("<f4").tolist() == [1.0, -2.0]


def write_shards(directory) -> dict[str, Any]:
    save_file({"a": np.ones(2, np.float32)}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, directory / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 20}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    return index


def test_shards_are_read_as_one(tmp_path):
    write_shards(tmp_path)
    weights = open_weights(tmp_path)
    assert weights.names() == ["a", "b"]
    assert weights.load("b").tolist() == [0.0, 0.0, 0.0]
    assert weights.load("a").tolist() == [1.0, 1.0]


def test_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"missing: model-00002-of-00002.safetensors; pull"):
        open_weights(tmp_path)


def test_index_that_contradicts_its_shards_is_refused(tmp_path):
    index = write_shards(tmp_path)
    index["weight_map"]["b"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="b is in model-00001"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", 7, None])
def test_index_cannot_point_out_of_the_directory(name, tmp_path):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="not a file beside the index"):
        open_weights(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_damaged_index_is_refused(content, tmp_path):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ModelError, match="index"):
        open_weights(tmp_path)


LIES = {
    "empty": b"",
    "short": b"abc",
    "header longer than the file": raw_file({}, header_bytes=1 << 62),
    "not JSON": raw_file(b"hello"),
    "not an object": raw_file([1, 2]),
    "deep JSON": raw_file(b"[" * 100_000),
    "no description": raw_file({"x": 3}),
    "beyond the end": raw_file({"x": entry()}, bytes(4)),
    "more data than tensors": raw_file({"x": entry()}, bytes(12)),
    "size against shape": raw_file({"x": entry(place=(0, 4))}, bytes(4)),
    "huge shape": raw_file({"x": entry(shape=(1 << 62, 1 << 62))}, bytes(8)),
    "negative shape": raw_file({"x": entry(shape=(-2,))}, bytes(8)),
    "shape of text": raw_file({"x": entry(shape="ab")}, bytes(8)),
    "backward offsets": raw_file({"x": entry(place=(8, 0))}, bytes(8)),
    "three offsets": raw_file({"x": entry(place=(0, 8, 8))}, bytes(8)),
    "overlap": raw_file({"x": entry(), "y": entry()}, bytes(8)),
    "hole": raw_file({"x": entry(place=(4, 12))}, bytes(12)),
    "unknown type": raw_file({"x": entry(dtype="F4", shape=(8,))}, bytes(8)),
    "list for a type": raw_file({"x": entry(dtype=["F32"])}, bytes(8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_file_that_lies_is_refused(lie, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(ModelError) as caught:
        open_weights(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), num_changes=st.integers(1, 4))
def test_changed_header_never_fails_otherwise(seed, num_changes, tmp_path):
    whole = raw_file({"x": entry(), "y": entry("F16", [2, 2], [8, 16])}, bytes(16))
    changed = bytearray(whole)
    rng = random.Random(seed)
    for _ in range(num_changes):
        changed[rng.randrange(len(changed) - 16)] = rng.randrange(256)
    path = tmp_path / "model.safetensors"
    path.write_bytes(changed)

    try:
        file = SafetensorsFile(path)
    except ModelError:
        return
    assert all(file.load(name).nbytes == tensor.num_bytes for name, tensor in file.tensors.items())
