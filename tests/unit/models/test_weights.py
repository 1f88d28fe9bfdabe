"""One view of a model directory's weights, whatever file holds them."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from headrace.errors import ModelError
from headrace.models.tensor_info import TensorInfo
from headrace.models.weights import open_weights


def test_gguf_tensors_appear_under_hugging_face_names(llama_builder, tmp_path):
    llama_builder.write(tmp_path / "any.gguf")
    weights = open_weights(tmp_path)

    assert len(weights.names()) == 2 + 2 * 9
    assert "lm_head.weight" not in weights.names()
    assert weights.metadata["llama.context_length"] == 128
    name = "model.layers.1.mlp.down_proj.weight"
    assert weights.info(name) == TensorInfo(name=name, shape=(32, 64), dtype_name="f32")
    assert weights.load(name).shape == (32, 64)


def test_loaded_gguf_tensor_may_be_written_to(llama_builder, tmp_path):
    llama_builder.write(tmp_path / "any.gguf")
    weights = open_weights(tmp_path)
    for name in weights.names():
        values = weights.load(name)
        assert values.flags.c_contiguous
        values[...] = 0.0
        assert weights.load(name).any()


def test_packed_blocks_are_in_the_same_row_order_as_loaded_values(gguf_builder, llama_builder, tmp_path):
    # Quantised query rows: unpacking the reordered blocks must equal reordering the unpacked values.
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (32, 18), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    gguf_builder.metadata = llama_builder.metadata
    gguf_builder.add("blk.0.attn_q.weight", (32, 32), "Q4_0", blocks.tobytes())
    gguf_builder.write(tmp_path / "any.gguf")
    weights = open_weights(tmp_path)

    name = "model.layers.0.self_attn.q_proj.weight"
    assert weights.info(name).dtype_name == "q4_0"
    packed = weights.load_packed(name)
    nibbles = np.concatenate([packed[:, 2:] & 15, packed[:, 2:] >> 4], axis=1).astype(np.float32)
    np.testing.assert_array_equal(weights.load(name), (nibbles - 8) * 0.5)
    assert not np.array_equal(packed, blocks)


def test_unknown_tensor_is_an_error_that_names_it(llama_builder, tmp_path):
    llama_builder.write(tmp_path / "any.gguf")
    weights = open_weights(tmp_path)
    for ask in (weights.info, weights.load, weights.load_packed):
        with pytest.raises(ModelError, match=r"no tensor lm_head\.weight"):
            ask("lm_head.weight")


def test_type_that_cannot_be_loaded_is_refused_at_once(llama_builder, tmp_path):
    llama_builder.add("output.weight", (1, 256), "IQ2_XXS", bytes(66))
    llama_builder.write(tmp_path / "any.gguf")
    with pytest.raises(ModelError, match="IQ2_XXS"):
        open_weights(tmp_path)


def test_safetensors_lead_over_gguf(llama_builder, tmp_path):
    llama_builder.write(tmp_path / "any.gguf")
    save_file({"only": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).names() == ["only"]


def test_directory_without_usable_weights_says_what_to_do(llama_builder, tmp_path):
    with pytest.raises(ModelError, match="headrace models pull"):
        open_weights(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no weights .* pull the model again"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pickled weights .* never read"):
        open_weights(tmp_path)
    llama_builder.write(tmp_path / "a.gguf")
    llama_builder.write(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        open_weights(tmp_path)
