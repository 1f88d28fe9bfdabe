"""Meaning of GGUF files by architecture: names, row order (checked through rotary embedding itself), rope scaling."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from headrace.errors import ModelError
from headrace.models.gguf_architectures import ARCHITECTURES, restore_row_order
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_metadata import GgufMetadata
from headrace.models.gguf_rope import rope_scaling
from headrace.models.weights import open_weights


def scaling_of(file: GgufFile, *, rotary_dim: int = 8, rope_theta: float = 1e4):
    return rope_scaling(file, GgufMetadata(file, "llama"), rotary_dim=rotary_dim, rope_theta=rope_theta)


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
    hf_tensor_name = ARCHITECTURES["llama"].hf_tensor_name
    assert hf_tensor_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_tensor_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    assert hf_tensor_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hf_tensor_name("output.weight") == "lm_head.weight"
    assert hf_tensor_name("blk.0.ssm_in.weight") is None
    assert hf_tensor_name("rope_freqs.weight") is None
    assert hf_tensor_name("blk.0.attn_q_norm.weight") is None
    assert ARCHITECTURES["qwen3"].hf_tensor_name("blk.0.attn_q_norm.weight") == "model.layers.0.self_attn.q_norm.weight"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_gguf_library(name):
    architecture = next(key for key, text in MODEL_ARCH_NAMES.items() if text == name)
    known = get_tensor_name_map(architecture, 1)
    ours = ARCHITECTURES[name]
    stored = [*(f"blk.0.{each}" for each in ours.layer_names), "token_embd", "output_norm"]
    for each in stored:
        hf_name = ours.hf_tensor_name(f"{each}.weight")
        assert known.get_name(hf_name.removesuffix(".weight")) == each
    # What the library has beside, this architecture's published files do not.
    assert {TENSOR_NAMES[key].format(bid=0) for key in MODEL_TENSORS[architecture]} >= set(stored)


def test_scales_of_norms_are_given_without_what_was_added(llama_builder, tmp_path):
    stored = {name: np.frombuffer(data, "<f4").reshape(shape) for name, shape, _, data, _ in llama_builder.tensors}
    llama_builder.metadata = {"general.architecture": "gemma2"}
    llama_builder.write(tmp_path / "a.gguf")
    weights = open_weights(tmp_path)
    assert np.array_equal(weights.load("model.norm.weight"), stored["output_norm.weight"] - 1)
    assert np.array_equal(weights.load("model.layers.1.input_layernorm.weight"), stored["blk.1.attn_norm.weight"] - 1)
    # Neither another tensor's values nor the order of heads.
    assert np.array_equal(weights.load("model.layers.1.self_attn.q_proj.weight"), stored["blk.1.attn_q.weight"])


def test_a_norm_that_was_rounded_after_the_addition_is_refused(gguf_builder, tmp_path):
    gguf_builder.metadata = {"general.architecture": "gemma3"}
    gguf_builder.add("output_norm.weight", (32,), "F16", bytes(64))
    gguf_builder.write(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"output_norm\.weight is F16; norms are read as F32 only"):
        open_weights(tmp_path).load("model.norm.weight")


def test_other_architectures_are_refused(llama_builder, tmp_path):
    llama_builder.metadata["general.architecture"] = "mamba"
    llama_builder.write(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="'mamba' is not supported; supported are llama, qwen2"):
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

    assert scaling_of(file, rotary_dim=64, rope_theta=500000.0) == {
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
        scaling_of(file, rotary_dim=64, rope_theta=500000.0)


def test_linear_scaling_is_kept_and_others_are_refused(llama_builder, tmp_path):
    llama_builder.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = GgufFile(llama_builder.write(tmp_path / "a.gguf"))
    assert scaling_of(file) == {"rope_type": "linear", "factor": 4.0}

    llama_builder.metadata["llama.rope.scaling.type"] = "ntk"
    file = GgufFile(llama_builder.write(tmp_path / "b.gguf"))
    with pytest.raises(ModelError, match="rope scaling 'ntk' is not supported in GGUF; none, linear, yarn, longrope and Llama 3's"):
        scaling_of(file)


def test_yarn_is_kept_with_what_differs_from_its_defaults(llama_builder, tmp_path):
    prefix = "llama.rope.scaling."
    llama_builder.metadata |= {f"{prefix}type": "yarn", f"{prefix}factor": 4.0, f"{prefix}original_context_length": 64}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert scaling_of(GgufFile(llama_builder.write(tmp_path / "a.gguf"))) == expected

    llama_builder.metadata |= {f"{prefix}yarn_beta_fast": 16.0, f"{prefix}yarn_beta_slow": 1.0, f"{prefix}yarn_attn_factor": 1.25}
    expected |= {"beta_fast": 16.0, "attention_factor": 1.25}
    assert scaling_of(GgufFile(llama_builder.write(tmp_path / "b.gguf"))) == expected

    for key in ("yarn_ext_factor", "yarn_log_multiplier"):
        llama_builder.metadata[f"{prefix}{key}"] = 0.5
        file = GgufFile(llama_builder.write(tmp_path / "c.gguf"))
        with pytest.raises(ModelError, match=rf"llama\.rope\.scaling\.{key} is 0\.5"):
            scaling_of(file)
        del llama_builder.metadata[f"{prefix}{key}"]


def longrope(builder):
    builder.metadata |= {"llama.context_length": 256, "llama.rope.scaling.original_context_length": 64}
    builder.add_f32("rope_factors_short.weight", np.array([1.0, 1.1, 1.2, 1.3]))
    builder.add_f32("rope_factors_long.weight", np.array([2.0, 4.0, 8.0, 16.0]))
    return builder


def test_longrope_is_two_lists_of_divisors(llama_builder, tmp_path):
    expected = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 64,
    }
    longrope(llama_builder)
    assert scaling_of(GgufFile(llama_builder.write(tmp_path / "a.gguf"))) == expected
    # The factor of attention that the lengths give is not repeated; another one is kept.
    llama_builder.metadata["llama.rope.scaling.attn_factor"] = (1 + np.log(4) / np.log(64)) ** 0.5
    assert scaling_of(GgufFile(llama_builder.write(tmp_path / "b.gguf"))) == expected
    llama_builder.metadata["llama.rope.scaling.attn_factor"] = 1.5
    file = GgufFile(llama_builder.write(tmp_path / "c.gguf"))
    assert scaling_of(file) == expected | {"attention_factor": 1.5}
    assert not any("rope" in name for name in open_weights_of(file).names())
    with pytest.raises(ModelError, match=r"rope_factors_short\.weight has shape \[4\], not \[3\]"):
        scaling_of(file, rotary_dim=6)


def open_weights_of(file: GgufFile):
    for other in file.path.parent.glob("*.gguf"):
        if other != file.path:
            other.unlink()
    return open_weights(file.path.parent)


def test_longrope_that_is_not_whole_is_refused(llama_builder, tmp_path):
    longrope(llama_builder)
    llama_builder.tensors.pop()
    with pytest.raises(ModelError, match=r"rope_factors_long\.weight is missing"):
        scaling_of(GgufFile(llama_builder.write(tmp_path / "a.gguf")))
    llama_builder.tensors.pop()
    llama_builder.metadata["llama.rope.scaling.type"] = "longrope"
    with pytest.raises(ModelError, match=r"is longrope, but rope_factors_long\.weight is missing"):
        scaling_of(GgufFile(llama_builder.write(tmp_path / "b.gguf")))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_divisors_that_divide_nothing_are_refused(bad, llama_builder, tmp_path):
    llama_builder.add_f32("rope_freqs.weight", np.array([1.0, 2.0, bad, 4.0]))
    with pytest.raises(ModelError, match="divides no frequency"):
        scaling_of(GgufFile(llama_builder.write(tmp_path / "a.gguf")))
