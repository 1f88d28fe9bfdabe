"""Fields of config.json that no one has read: refused where they change what a network computes, reported where nobody knows.

A family that ignored such a field would load and compute something else than its file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from headrace.errors import ModelError
from headrace.models.model_config import ModelConfig

_OFF: Final[tuple[Any, ...]] = (False, 0, 0.0, "", [], {})
"""Values that mean that something is not there."""

COMPUTING: Final[Mapping[str, tuple[Any, ...]]] = {
    # Biases.
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "add_qkv_bias", "add_bias_linear", "lm_head_bias"), _OFF
    ),
    "no_bias": (True,),
    # Which tokens attend to which.
    "layer_types": (),
    **dict.fromkeys(("sliding_window", "use_sliding_window", "attention_chunk_size", "sliding_window_pattern"), _OFF),
    **dict.fromkeys(("use_bidirectional_attention", "is_decoder", "is_encoder_decoder", "add_cross_attention"), _OFF),
    **dict.fromkeys(("alibi", "attention_sinks", "dual_chunk_attention_config", "attn_output_gate", "gating"), _OFF),
    "is_causal": (True,),
    # Positions.
    "position_embedding_type": ("rope", "absolute"),
    **dict.fromkeys(
        ("no_rope_layers", "no_rope_layer_interval", "rope_interleaved", "use_mrope", "mrope_section", "rotary_pct"), _OFF
    ),
    "rope_local_base_freq": (),
    # Norms, scales, caps.
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "clip_qkv", "norm_type", "layer_norm_eps", "norm_eps"), _OFF),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "logit_scale"), _OFF),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), (1, 1.0)),
    **dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base", "query_pre_attn_scalar", "embedding_size"), _OFF),
    **dict.fromkeys(("scale_embedding", "parallel_attn", "use_parallel_residual", "parallel_residual"), _OFF),
    # Feed-forward and experts.
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "swiglu_alpha", "swiglu_limit"), _OFF),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"), _OFF),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "first_k_dense_replace"), _OFF),
    **dict.fromkeys(("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "routed_scaling_factor"), _OFF),
    # Other kinds of layers, inputs and weights.
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "qk_rope_head_dim", "num_nextn_predict_layers"), _OFF),
    **dict.fromkeys(("mamba_d_state", "ssm_cfg", "linear_num_key_heads", "conv_L_cache", "altup_num_inputs"), _OFF),
    **dict.fromkeys(("vision_config", "audio_config", "quantization", "num_kv_shared_layers", "block_size"), _OFF),
}
"""Fields that change what some networks compute, and the values with which they change nothing."""

# fmt: off
HARMLESS: Final = frozenset((
    "_attn_implementation_autoset", "_name_or_path", "_sliding_window_pattern", "architectures", "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_implementation", "auto_map", "begin_suppress_tokens", "boi_token_index", "bos_token_id", "cache_implementation",
    "classifier_dropout", "cls_token_id", "dtype", "embd_pdrop", "eoi_token_index", "eos_token_id", "experts_per_token",
    "finetuning_task", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "image_token_index",
    "initial_context_length", "initializer_range", "keys_to_ignore_at_inference", "label2id", "max_window_layers",
    "mm_tokens_per_image", "model_type", "original_max_position_embeddings", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type", "prefix", "pretraining_tp", "problem_type", "quantization_config",
    "resid_pdrop", "return_dict",
    "rms_norm_eps", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
))
# fmt: on
"""Fields that describe training, tokens or bookkeeping, and `quantization_config`, which the reader of weights checks."""


def check_all_read(config: ModelConfig) -> None:
    """Refuse a config whose meaning the family did not take up.

    Raises:
        ModelError: Names the first field that changes what a network computes and that was not read.
    """
    for name, value in config.fields.unread().items():
        neutral = COMPUTING.get(name)
        if neutral is not None and not _is_neutral(name, value, neutral):
            raise ModelError(
                f"{config.fields.path}: {name} {_shown(value)} is not supported for {config.architecture}: take another model",
                param=name,
            )


def unknown_fields(config: ModelConfig) -> tuple[str, ...]:
    """Fields that were not read, and of which it is not known whether they matter; for the log."""
    return tuple(sorted(config.fields.unread().keys() - COMPUTING.keys() - HARMLESS))


def _is_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> bool:
    if name == "layer_types":
        return isinstance(value, list) and all(layer_type == "full_attention" for layer_type in value)
    # To Python 1 is true; to a file they are not the same, but both are none of these.
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
