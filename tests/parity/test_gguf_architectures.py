"""Goal: a GGUF file of each architecture is the model that it was converted from.

Method: a tiny random model of transformers is written as GGUF, by the rules of llama.cpp's conversion scripts and the library's
table of names; from the config.json and the weights that we read, transformers builds the model again, and our worker its own. All
must give the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES, RopeScalingType
from tokenizers.pre_tokenizers import ByteLevel

from headrace.models.gguf_architectures import ARCHITECTURES
from headrace.models.gguf_convert import write_hf_files
from headrace.models.weights import open_weights

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [2.0, 3.0, 5.0],
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
SMALL_WINDOW = {"sliding_window": 8, "head_dim": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 5000.0, "tie_word_embeddings": False}),
    "mistral": ("llama", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with yarn": ("qwen2", {"rope_parameters": YARN | {"rope_theta": 5000.0}}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        SMALL_WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 9.0},
    ),
    "gemma3": ("gemma3", SMALL_WINDOW | {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
    "gemma3 with a longer context": (
        "gemma3",
        SMALL_WINDOW | {"query_pre_attn_scalar": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5000.0},
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3 with longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 16,
            "sliding_window": None,
        },
    ),
    "olmo2": ("olmo2", {"rms_norm_eps": 1e-4}),
    "olmo3": ("olmo2", {"sliding_window": 8, "rope_scaling": YARN | {"attention_factor": 1.3}}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
}


def make_model(case: str) -> Any:
    family = case.split(maxsplit=1)[0]
    config_class = transformers.CONFIG_MAPPING["gemma3_text" if family == "gemma3" else family]
    config = config_class(**(SHAPE | CASES[case][1]), attn_implementation="eager")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                values.add_(0.3 * torch.randn(values.shape))
    return model


def add_metadata(writer: GGUFWriter, architecture: str, config: Any) -> None:
    """The keys that the conversion script of each architecture writes."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    if architecture in ("gemma2", "gemma3", "qwen3", "llama"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ("llama", "granite", "smollm3"):
        writer.add_rope_dimension_count(head_dim)
    if architecture != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    OWN_KEYS.get(architecture, lambda *_: None)(writer, config)


def add_gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def add_gemma3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def add_phi3(writer: GGUFWriter, config: Any) -> None:
    rope, head_dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    original = config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))


def add_olmo(writer: GGUFWriter, config: Any) -> None:
    if config.model_type == "olmo3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def add_granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


OWN_KEYS: dict[str, Callable[[GGUFWriter, Any], None]] = {
    "gemma2": add_gemma2,
    "gemma3": add_gemma3,
    "phi3": add_phi3,
    "olmo2": add_olmo,
    "granite": add_granite,
}


def stored(architecture: str, name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """What the conversion scripts do to a tensor: rows of turned heads interleaved, 1 added to Gemma's norms."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture in ("llama", "granite", "smollm3") and heads is not None:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return values + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else values


def write_gguf(path: Path, architecture: str, model: Any) -> None:
    config = model.config
    writer = GGUFWriter(path, architecture)
    add_metadata(writer, architecture, config)
    pieces = ["<|end|>", "<s>", *sorted(ByteLevel.alphabet()), "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3, 3, *[1] * (len(pieces) - 2)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    key = next(each for each, text in MODEL_ARCH_NAMES.items() if text == architecture)
    names = get_tensor_name_map(key, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, stored(architecture, name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", CASES)
def test_model_read_from_gguf_gives_the_same_logits(case: str, tmp_path: Path, make_driver: Callable[..., Any]) -> None:
    original = make_model(case)
    write_gguf(tmp_path / "model.gguf", CASES[case][0], original)
    write_hf_files(tmp_path / "model.gguf", tmp_path)

    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    again = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = open_weights(tmp_path)
    state = {name: torch.from_numpy(weights.load(name)) for name in weights.names()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    again.load_state_dict(state)

    token_ids = torch.arange(40).mul(37).remainder(259)[None]
    with torch.inference_mode():
        expected, found = original(token_ids).logits, again(token_ids).logits
    # Only Gemma's norms have been through an addition and its reversal.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert config.max_position_embeddings == 256
    assert expected.std() > 0.05

    driver = make_driver(tmp_path)
    driver.enter(0, token_ids[0].tolist())
    driver.step({0: 25})
    _, logits = driver.step({0: 15})
    torch.testing.assert_close(logits[0], expected[0, -1], rtol=1e-4, atol=1e-4)


def test_every_architecture_is_covered_here() -> None:
    assert {architecture for architecture, _ in CASES.values()} == set(ARCHITECTURES)
