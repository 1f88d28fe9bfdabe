"""config.json of a GGUF file: what every architecture has, and what each says for itself.

Files leave out what llama.cpp knows by heart, such as which layers of Gemma have a window; that is stated here.

Source: llama.cpp's conversion scripts and loaders, and the published config.json files of these models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from headrace.errors import ModelError
from headrace.models.gguf_architectures import GgufArchitecture
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_metadata import GgufMetadata
from headrace.models.gguf_rope import rope_scaling

_EMBEDDING: Final = "model.embed_tokens.weight"
_OUTPUT: Final = "lm_head.weight"
_SLIDING: Final = "sliding_attention"
_FULL: Final = "full_attention"

_GEMMA2_27B_LAYERS: Final = 46
_GEMMA3_27B_LAYERS: Final = 62
"""The largest model of each scales scores by the width over the heads, the others by the head's size; no file says so."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the config of an architecture is made from."""

    file: GgufFile
    metadata: GgufMetadata
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int


def hf_config(file: GgufFile, architecture: GgufArchitecture, names: Mapping[str, str], num_tokens: int) -> dict[str, Any]:
    """Give the contents of config.json, but for special tokens.

    Args:
        file: The file.
        architecture: Its architecture.
        names: Hugging Face tensor names and the file's own.
        num_tokens: Size of the vocabulary.

    Raises:
        ModelError: A value is missing or makes no sense, or what it asks for is not supported.
    """
    shape = _shape(file, architecture)
    metadata = shape.metadata
    rotary_dim = metadata.integer("rope.dimension_count", default=shape.head_dim)
    if rotary_dim != shape.head_dim and architecture.name != "phi3":
        raise ModelError(f"{file.path}: rotary embedding over {rotary_dim} of {shape.head_dim} dimensions is not supported")
    rope_theta = metadata.real("rope.freq_base", default=10000.0)
    config = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(file, names, num_tokens),
        "hidden_size": shape.hidden_size,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", default=shape.num_heads),
        "head_dim": shape.head_dim,
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon", default=1e-5),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling(file, metadata, rotary_dim=rotary_dim, rope_theta=rope_theta),
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.down_proj.bias" in names,
        "hidden_act": "silu",
        # A file without an output projection uses the embedding for both.
        "tie_word_embeddings": _OUTPUT not in names,
        "dtype": "bfloat16",
    }
    own = _OWN_FIELDS.get(architecture.name)
    return config if own is None else config | own(shape)


def _shape(file: GgufFile, architecture: GgufArchitecture) -> _Shape:
    metadata = GgufMetadata(file, architecture.name)
    hidden_size = metadata.integer("embedding_length")
    num_heads = metadata.integer("attention.head_count")
    if num_heads == 0 or hidden_size == 0:
        raise ModelError(f"{file.path}: says {num_heads} attention heads over a width of {hidden_size}; pull the model again")
    num_layers = metadata.integer("block_count")
    if num_layers > len(file.tensors):
        raise metadata.bad("block_count", num_layers, f"at most the number of its tensors, {len(file.tensors)}")
    head_dim = metadata.integer("attention.key_length", default=hidden_size // num_heads)
    value_dim = metadata.integer("attention.value_length", default=head_dim)
    if value_dim != head_dim:
        raise ModelError(f"{file.path}: keys of {head_dim} and values of {value_dim} dimensions are not supported")
    return _Shape(file, metadata, hidden_size, num_layers, num_heads, head_dim)


def _vocab_size(file: GgufFile, names: Mapping[str, str], num_tokens: int) -> int:
    if _EMBEDDING not in names:
        raise ModelError(f"{file.path}: has no token embedding; pull the model again")
    num_rows = file.tensors[names[_EMBEDDING]].shape[0]
    if num_rows < num_tokens:
        raise ModelError(f"{file.path}: {num_tokens} tokens but an embedding of {num_rows} rows; pull the model again")
    return num_rows


def _layer_types(shape: _Shape, period: int) -> list[str]:
    """Which layers have a window: as the file says, else all but every `period`-th."""
    key = "attention.sliding_window_pattern"
    stored = shape.metadata.get(key)
    if isinstance(stored, list):
        if len(stored) != shape.num_layers or not all(isinstance(item, bool) for item in stored):
            raise shape.metadata.bad(key, stored, f"a list of {shape.num_layers} flags")
        return [_SLIDING if has_window else _FULL for has_window in stored]
    period = shape.metadata.integer(key, default=period)
    return [_SLIDING if period and (layer + 1) % period else _FULL for layer in range(shape.num_layers)]


def _gemma(shape: _Shape, largest: int) -> dict[str, Any]:
    per_head = shape.hidden_size // shape.num_heads
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if shape.num_layers == largest else shape.head_dim,
    }


def _gemma2(shape: _Shape) -> dict[str, Any]:
    return _gemma(shape, _GEMMA2_27B_LAYERS) | {
        "sliding_window": shape.metadata.integer("attention.sliding_window", default=4096),
        "layer_types": _layer_types(shape, 2),
        "attn_logit_softcapping": shape.metadata.real("attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": shape.metadata.real("final_logit_softcapping", default=30.0),
    }


def _gemma3(shape: _Shape) -> dict[str, Any]:
    window = shape.metadata.integer("attention.sliding_window", default=0)
    cap = shape.metadata.real("final_logit_softcapping") if shape.metadata.has("final_logit_softcapping") else None
    return _gemma(shape, _GEMMA3_27B_LAYERS) | {
        "rope_theta": shape.metadata.real("rope.freq_base", default=1_000_000.0),
        "rope_local_base_freq": shape.metadata.real("rope.freq_base_swa", default=10_000.0),
        "sliding_window": window or None,
        "layer_types": _layer_types(shape, 6) if window else [_FULL] * shape.num_layers,
        "final_logit_softcapping": cap,
    }


def _phi3(shape: _Shape) -> dict[str, Any]:
    rotary_dim = shape.metadata.integer("rope.dimension_count", default=shape.head_dim)
    if not 0 < rotary_dim <= shape.head_dim or rotary_dim % 2:
        raise shape.metadata.bad("rope.dimension_count", rotary_dim, f"an even number up to {shape.head_dim}")
    context = shape.metadata.integer("context_length")
    return {
        "partial_rotary_factor": rotary_dim / shape.head_dim,
        "original_max_position_embeddings": shape.metadata.integer("rope.scaling.original_context_length", default=context),
        # Written as 0 where there is none.
        "sliding_window": shape.metadata.integer("attention.sliding_window", default=0) or None,
    }


def _olmo2(shape: _Shape) -> dict[str, Any]:
    window = shape.metadata.integer("attention.sliding_window", default=0)
    if not window:
        return {}
    # OLMo 3 goes by the name of its predecessor.
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": _layer_types(shape, 4),
    }


def _granite(shape: _Shape) -> dict[str, Any]:
    return {
        "embedding_multiplier": shape.metadata.real("embedding_scale", default=1.0),
        "attention_multiplier": shape.metadata.real("attention.scale", default=shape.head_dim**-0.5),
        "residual_multiplier": shape.metadata.real("residual_scale", default=1.0),
        "logits_scaling": shape.metadata.real("logit_scale"),
    }


def _smollm3(shape: _Shape) -> dict[str, Any]:
    # A 1 stands for a layer with positions.
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(shape.num_layers)]}


_OWN_FIELDS: Final[Mapping[str, Callable[[_Shape], dict[str, Any]]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "smollm3": _smollm3,
}
