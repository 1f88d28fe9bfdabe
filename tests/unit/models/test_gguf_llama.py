"""Meaning of a Llama GGUF: names, row order (checked through rotary embedding itself), rope scaling."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.errors import ModelError
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_llama import hf_tensor_name, restore_row_order, rope_scaling
from headrace.models.weights import open_weights


def rotate_neighbours(head: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotary embedding as ggml applies it to llama files: pairs (0, 1), (2, 3), ..."""
    out = np.empty_like(head)
    out[0::2] = head[0::2] * np.cos(angles) - head[1::2] * np.sin(angles)
    out[1::2] = head[1::2] * np.cos(angles) + head[0::2] * np.sin(angles)
    return out


def rotate_halves(head: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotary embedding as Hugging Face applies it: pairs (0, d/2), (1, d/2 + 1), ..."""
    first, second = np.split(head, 2)
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)])


def test_restored_rows_give_the_same_attention_scores_under_the_other_rotation():
    # The meaning of the order: rotated queries and keys must have the same products in both conventions.
    rng = np.random.default_rng(3)
    num_heads, head_dim, width = 3, 8, 5
    query_rows, key_rows = rng.standard_normal((2, num_heads * head_dim, width))
    x, y = rng.standard_normal((2, width))
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)

    def scores(query_weight, key_weight, rotate):
        queries = (query_weight @ x).reshape(num_heads, head_dim)
        keys = (key_weight @ y).reshape(num_heads, head_dim)
        pairs = zip(queries, keys, strict=True)
        return [rotate(query, 9 * frequencies) @ rotate(key, 4 * frequencies) for query, key in pairs]

    restored = [restore_row_order(rows, num_heads=num_heads) for rows in (query_rows, key_rows)]
    np.testing.assert_allclose(scores(*restored, rotate_halves), scores(query_rows, key_rows, rotate_neighbours), rtol=1e-9)


def test_only_query_and_key_rows_change_their_order(llama_builder, tmp_path):
    stored = {name: np.frombuffer(data, "<f4").reshape(shape) for name, shape, _, data, _ in llama_builder.tensors}
    llama_builder.write(tmp_path / "a.gguf")
    weights = open_weights(tmp_path)

    assert np.array_equal(weights.load("model.layers.1.self_attn.v_proj.weight"), stored["blk.1.attn_v.weight"])
    query = weights.load("model.layers.1.self_attn.q_proj.weight")
    # Head of eight rows: even rows first, then odd ones.
    assert np.array_equal(query[:8], stored["blk.1.attn_q.weight"][[0, 2, 4, 6, 1, 3, 5, 7]])
    key = weights.load("model.layers.0.self_attn.k_proj.weight")
    assert np.array_equal(key[8:], stored["blk.0.attn_k.weight"][[8, 10, 12, 14, 9, 11, 13, 15]])


@pytest.mark.parametrize("num_heads", [0, 3, 16, 32])
def test_rows_that_are_no_heads_are_refused(num_heads):
    with pytest.raises(ModelError, match="heads"):
        restore_row_order(np.zeros((16, 2)), num_heads=num_heads)


def test_names_are_translated():
    assert hf_tensor_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_tensor_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    assert hf_tensor_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hf_tensor_name("output.weight") == "lm_head.weight"
    assert hf_tensor_name("blk.0.ssm_in.weight") is None
    assert hf_tensor_name("rope_freqs.weight") is None


def test_other_architectures_are_refused(llama_builder, tmp_path):
    llama_builder.metadata["general.architecture"] = "gemma3"
    llama_builder.write(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="'gemma3' is not supported"):
        open_weights(tmp_path)


def test_experts_are_refused(llama_builder, tmp_path):
    llama_builder.metadata["llama.expert_count"] = 8
    llama_builder.write(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="8 experts"):
        open_weights(tmp_path)


def test_foreign_tensor_is_refused(llama_builder, tmp_path):
    llama_builder.add_f32("blk.0.ssm_in.weight", np.zeros(8))
    llama_builder.write(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"blk\.0\.ssm_in\.weight"):
        open_weights(tmp_path)


def llama3_divisors(factor: float, head_dim: int, theta: float) -> list[float]:
    """Llama 3's rule, one frequency at a time: keep the fast, divide the slow, mix between 1 and 4 turns in 8192 positions."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi / theta ** (-index / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def test_llama3_scaling_is_found_from_its_divisors(llama_builder, tmp_path):
    llama_builder.add_f32("rope_freqs.weight", np.array(llama3_divisors(32.0, 64, 500000.0)))
    file = GgufFile(llama_builder.write(tmp_path / "a.gguf"))

    assert rope_scaling(file, head_dim=64, rope_theta=500000.0) == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in open_weights(tmp_path).names()


def test_divisors_of_another_scaling_are_refused(llama_builder, tmp_path):
    llama_builder.add_f32("rope_freqs.weight", np.linspace(1, 32, 32))
    file = GgufFile(llama_builder.write(tmp_path / "a.gguf"))
    with pytest.raises(ModelError, match="scaling is not supported"):
        rope_scaling(file, head_dim=64, rope_theta=500000.0)


def test_linear_scaling_is_kept_and_others_are_refused(llama_builder, tmp_path):
    llama_builder.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = GgufFile(llama_builder.write(tmp_path / "a.gguf"))
    assert rope_scaling(file, head_dim=8, rope_theta=1e4) == {"rope_type": "linear", "factor": 4.0}

    llama_builder.metadata["llama.rope.scaling.type"] = "yarn"
    file = GgufFile(llama_builder.write(tmp_path / "b.gguf"))
    with pytest.raises(ModelError, match="yarn"):
        rope_scaling(file, head_dim=8, rope_theta=1e4)
