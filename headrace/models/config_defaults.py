"""What a config.json may leave out, by architecture: writers of these files omit values that are a family's own defaults.

Source: the families' published config.json files and the defaults that Hugging Face's configuration classes document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_GEMMA: Final = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA_3: Final = _GEMMA | {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "sliding_window": 4096,
}
_OLMO: Final = {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5}

CONFIG_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "BertModel": {"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA_3,
    "Gemma3ForConditionalGeneration": _GEMMA_3,
    "GptOssForCausalLM": {"head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0},
    "MixtralForCausalLM": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "MistralForCausalLM": {"num_key_value_heads": 8},
    "Olmo2ForCausalLM": _OLMO,
    "Olmo3ForCausalLM": _OLMO,
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "Qwen3ForCausalLM": {"head_dim": 128},
    "SmolLM3ForCausalLM": {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
}
"""Architecture → field → value where the file has none."""
