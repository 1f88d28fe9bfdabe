"""Goal: what cannot be computed is refused at load, in one line that names it; what can is planned to fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from headrace.errors import ConfigError, ModelError
from headrace.models.model_config import RopeConfig
from services.worker.backend_choice import DeviceOptions
from services.worker.kv_cache import PageShape, plan_memory
from services.worker.layers.linear import Linear, can_pack_bfloat16
from services.worker.layers.rotary import Rotary, rotary_tables
from services.worker.loading import LoadOptions, choose_dtype, load_runner

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LAYER = "model.layers.0."


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "model.norm.weight": (8,),
        LAYER + "input_layernorm.weight": (8,),
        LAYER + "post_attention_layernorm.weight": (8,),
        LAYER + "self_attn.q_proj.weight": (8, 8),
        LAYER + "self_attn.k_proj.weight": (4, 8),
        LAYER + "self_attn.v_proj.weight": (4, 8),
        LAYER + "self_attn.o_proj.weight": (8, 8),
        LAYER + "mlp.gate_proj.weight": (12, 8),
        LAYER + "mlp.up_proj.weight": (12, 8),
        LAYER + "mlp.down_proj.weight": (8, 12),
    }
    generator = np.random.default_rng(1)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(directory: Path, weights: dict[str, np.ndarray[Any, Any]], **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(weights, directory / "model.safetensors")
    return directory


def load(directory: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "directory": directory,
        "backend": "torch",
        "num_threads": 1,
        "dtype": "float32",
        "max_model_len": None,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "page_size": 8,
        "kv_cache_bytes": 1 << 20,
        "kv_cache_tokens": None,
    }
    return load_runner(LoadOptions(**(values | changes)), cpu_flags=frozenset(), available_bytes=lambda: 1 << 30)


def test_whole_directory_loads(tmp_path: Path) -> None:
    runner, report = load(write(tmp_path, tensors()))
    assert runner.limits.max_model_len == 64
    assert report.memory.weight_bytes == sum(values.nbytes for values in tensors().values())
    runner.warm_up()


def test_quantised_directory_loads(tmp_path: Path) -> None:
    weights = tensors()
    for name in [name for name in weights if "_proj" in name]:
        scales = np.abs(weights[name]).max(axis=1, keepdims=True) / 127
        weights[name] = (weights[name] / scales).round().astype(np.int8)
        weights[name.replace(".weight", ".weight_scale")] = scales
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    runner, _ = load(write(tmp_path, weights, quantization_config=config))
    runner.warm_up()
    with pytest.raises(ModelError, match="quant_method is 'hqq', which is not supported; supported: awq, gptq"):
        load(write(tmp_path, tensors(), quantization_config={"quant_method": "hqq"}))


def test_second_copy_of_a_tied_matrix_and_old_rope_tables_are_left(tmp_path: Path) -> None:
    weights = tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights[LAYER + "self_attn.rotary_emb.inv_freq"] = np.zeros(2, dtype=np.float32)
    assert load(write(tmp_path, weights))[0].limits.vocab_size == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(LAYER + "mlp.up_proj.weight"), r"mlp\.up_proj\.weight \[12, 8\] is missing"),
        (lambda w: w.update({"model.extra.weight": np.zeros((3, 4), np.float32)}), r"model\.extra\.weight \[3, 4\]"),
        (
            lambda w: w.update({"model.norm.weight": np.zeros(9, np.float32)}),
            r"model\.norm\.weight has shape \[9\], but config\.json asks for \[8\]",
        ),
        (lambda w: w.update({"model.norm.weight": np.zeros(8, np.int32)}), r"model\.norm\.weight holds i32"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    weights = tensors()
    change(weights)
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path, weights))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; supported are Gemma2ForCausalLM, "),
        ({"rope_scaling": {"rope_type": "ntk"}}, "'ntk' is not supported; supported are default, linear, dynamic, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method is 'hqq', which is not supported"),
        ({"hidden_act": "swish2"}, "'swish2' is not supported; supported are silu"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight \[32, 8\] is missing"),
        ({"attention_bias": True}, r"q_proj\.bias \[8\] is missing"),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path, tensors(), **changes))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="pull the model again"):
        load(tmp_path)


def test_a_package_from_the_settings_gives_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "headrace_other_models.py").write_text(
        "from services.worker.models.llama import llama\n\nARCHITECTURES = {'OtherForCausalLM': llama}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    directory = write(tmp_path, tensors(), architectures=["OtherForCausalLM"], mystery=1)
    runner, report = load(directory, external_package="headrace_other_models")
    assert runner.limits.vocab_size == 32
    assert report.unknown_fields == ("mystery",)
    with pytest.raises(ModelError, match="'OtherForCausalLM' is not supported"):
        load(directory)
    monkeypatch.delitem(sys.modules, "headrace_other_models")


def test_positions_that_are_scaled_reach_past_the_context(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    directory = write(tmp_path, tensors(), rope_scaling=scaling)
    assert load(directory)[0].limits.max_model_len == 64
    assert load(directory, max_model_len=128)[0].limits.max_model_len == 128
    with pytest.raises(ConfigError, match="max_model_len is 129; the model has 128"):
        load(directory, max_model_len=129)


def test_only_a_part_of_a_head_may_be_turned() -> None:
    tables = rotary_tables(RopeConfig(10000.0, rotary_factor=0.5), head_dim=8, context=32, max_position=32)
    heads = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(3))
    turned = heads.clone()
    rotary = Rotary(tables, torch.float32)
    rotary.apply_(turned, rotary.rows(torch.tensor([1, 7, 31])))
    torch.testing.assert_close(turned[..., 4:], heads[..., 4:])
    assert not torch.allclose(turned[..., :4], heads[..., :4])
    with pytest.raises(ModelError, match="3 of a head's 6 values are to be turned"):
        rotary_tables(RopeConfig(10000.0, rotary_factor=0.5), head_dim=6, context=32, max_position=32)


def test_longer_sequences_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 65; the model has 64"):
        load(write(tmp_path, tensors()), max_model_len=65)


SHAPE = PageShape(num_layers=2, num_kv_heads=3, head_dim=4, page_size=16, dtype=torch.bfloat16)


def plan(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "weight_bytes": 1,
        "available_bytes": 1 << 30,
        "kv_cache_bytes": 1 << 20,
        "kv_cache_tokens": None,
        "max_model_len": 100,
    }
    return plan_memory(SHAPE, **(values | changes))


def test_memory_plan_counts_pages_and_margin() -> None:
    assert SHAPE.num_bytes == 2 * 16 * 2 * 3 * 4 * 2
    assert plan().num_pages == (1 << 20) // SHAPE.num_bytes
    by_tokens = plan(kv_cache_tokens=161)
    assert (by_tokens.num_pages, by_tokens.kv_bytes) == (11, 11 * SHAPE.num_bytes)
    assert by_tokens.margin_bytes == (1 << 30) - by_tokens.kv_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_tokens": 96}, "worker.kv_cache_tokens: 6 pages of 16 tokens do not hold one sequence"),
        ({"kv_cache_bytes": 1}, "worker.kv_cache_bytes: 0 pages"),
        ({"available_bytes": 1 << 28}, "do not fit into the 268435456 bytes"),
    ],
)
def test_memory_that_cannot_be_had_is_a_config_error(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_auto_dtype_follows_the_cpu() -> None:
    assert choose_dtype("auto", frozenset())[0] == "float32"
    assert choose_dtype("bfloat16", frozenset()) == ("bfloat16", "set")
    expected = "bfloat16" if can_pack_bfloat16() else "float32"
    assert choose_dtype("auto", frozenset({"avx512_bf16"}))[0] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_linear_is_a_product_with_the_transposed_weight(dtype: torch.dtype, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(24, 16, generator=generator).to(dtype), torch.randn(24, generator=generator).to(dtype)
    x = torch.randn(num_rows, 16, generator=generator).to(dtype)
    expected = x.double() @ weight.double().T + bias.double()
    with torch.inference_mode():
        ours = Linear(weight, bias)(x)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), expected, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def test_rotary_keeps_lengths_and_leaves_position_zero() -> None:
    rotary = Rotary(rotary_tables(RopeConfig(10000.0), head_dim=8, context=32, max_position=32), torch.float32)
    heads = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(3))
    turned = heads.clone()
    rotary.apply_(turned, rotary.rows(torch.tensor([0, 7, 31])))
    torch.testing.assert_close(turned[0], heads[0])
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    assert not torch.allclose(turned[1], heads[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "native", "dtype": "bfloat16"}, r"worker\.backend is native: page_size 8 is not 16, 32, 64 or 128"),
        ({"backend": "native", "page_size": 32}, r"worker\.backend is native: .*worker\.dtype is float32"),
        ({"kv_cache_bytes": 1}, r"worker\.kv_cache_bytes: 0 pages of 8 tokens do not hold one sequence"),
        ({"max_model_len": 65}, r"model\.max_model_len is 65; the model has 64 positions"),
    ],
)
def test_what_needs_no_weights_is_refused_before_they_are_read(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Method: there are no weights, which would be another error."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **settings)


def native_tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Those of a model whose heads the native kernels have: of 16 numbers."""
    generator = np.random.default_rng(2)
    return {
        name: generator.normal(size=tuple({8: 32, 4: 16, 12: 32}.get(size, size) for size in tensor.shape)).astype(np.float32)
        for name, tensor in tensors().items()
    }


@pytest.mark.parametrize(("backend", "page_size"), [("torch", 8), ("auto", 8), ("native", 16), ("auto", 16)], ids=str)
@pytest.mark.usefixtures("native_library")
def test_twice_as_many_pages_of_8_bits_fit(tmp_path: Path, backend: str, page_size: int) -> None:
    """With `auto`, the native kernels have them where they have the model and its pages."""
    directory = write(tmp_path, native_tensors(), hidden_size=32, intermediate_size=32)
    options = {"backend": backend, "page_size": page_size, "dtype": "bfloat16"}
    plain, eight = (load(directory, kv_cache_dtype=kv_dtype, **options)[1] for kv_dtype in ("auto", "fp8_e4m3"))
    assert plain.backend == eight.backend == ("native" if page_size == 16 else "torch")
    assert eight.memory.num_pages == 2 * plain.memory.num_pages
    assert eight.memory.kv_bytes == plain.memory.kv_bytes
    # What holds one sequence of 64 tokens in 8 bits does not in 16.
    needed = plain.memory.kv_bytes // plain.memory.num_pages * 64 // page_size // 2
    assert load(directory, kv_cache_bytes=needed, kv_cache_dtype="fp8_e4m3", **options)[1].memory.kv_bytes == needed
    with pytest.raises(ConfigError, match="do not hold one sequence"):
        load(directory, kv_cache_bytes=needed, **options)


def test_pages_of_8_bits_are_refused_where_no_kernel_has_them(tmp_path: Path) -> None:
    """Method: there are no weights, which would be another error."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        ConfigError, match=r"worker\.kv_cache_dtype is fp8_e4m3, .* the backend is triton: set it to auto"
    ) as refused:
        load(tmp_path, device=DeviceOptions(attention_backend="triton"), kv_cache_dtype="fp8_e4m3")
    assert refused.value.param == "worker.kv_cache_dtype"
    with pytest.raises(ConfigError, match=r"worker\.backend is native: .*8 bits, and worker\.dtype is float32"):
        load(tmp_path, backend="native", kv_cache_dtype="fp8_e4m3")
