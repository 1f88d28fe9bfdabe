"""Qwen 2 and 2.5 (biases of queries, keys and values), Qwen 3 (norms of queries and keys) and Qwen 3 with experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.models.model_config import ModelConfig
from services.worker.layers.blocks import (
    Attention,
    AttentionOptions,
    Block,
    Decoder,
    GatedMlp,
    Mixture,
    MixtureOptions,
    hidden_act,
    model_rotary,
    pre_norm_layer,
)
from services.worker.layers.layer_types import optional_windows
from services.worker.layers.ops import Model, Ops


def qwen2(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    mlp = _dense(config, ops)
    return _qwen(config, ops, max_model_len, optional_windows(config), AttentionOptions(qkv_bias=True), mlp)


def qwen3(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    mlp = _dense(config, ops)
    return _qwen(config, ops, max_model_len, optional_windows(config), _normed(config), mlp)


def qwen3_moe(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`; here a window is in all layers or in none."""
    fields = config.fields
    is_windowed, window = fields.flag("use_sliding_window"), fields.optional_size("sliding_window", default=4096)
    windows = (window if is_windowed else None,) * config.num_layers
    options = MixtureOptions(
        # Files that transformers 5 writes have the first name, published ones the second.
        num_experts=fields.size("num_local_experts", default=fields.size("num_experts", default=128)),
        top_k=fields.size("num_experts_per_tok", default=8),
        inner_size=fields.size("moe_intermediate_size", default=768),
        activation=hidden_act(config),
        is_normalized=fields.flag("norm_topk_prob"),
    )
    sparse_step = fields.size("decoder_sparse_step", default=1)
    dense_layers = set(fields.list_of("mlp_only_layers", int) or ())
    dense = _dense(config, ops)

    def mlp(index: int) -> Block:
        if index in dense_layers or (index + 1) % sparse_step:
            return dense(index)
        return Mixture(config, ops, f"model.layers.{index}.mlp", options)

    return _qwen(config, ops, max_model_len, windows, _normed(config), mlp)


def _normed(config: ModelConfig) -> AttentionOptions:
    bias = config.fields.flag("attention_bias")
    return AttentionOptions(qkv_bias=bias, out_bias=bias, qk_norm="head")


def _dense(config: ModelConfig, ops: Ops) -> Callable[[int], Block]:
    activation = hidden_act(config)
    return lambda index: GatedMlp(config, ops, f"model.layers.{index}.mlp", activation=activation)


def _qwen(
    config: ModelConfig,
    ops: Ops,
    max_model_len: int,
    windows: Sequence[int | None],
    options: AttentionOptions,
    mlp: Callable[[int], Block],
) -> Model:
    rotary = model_rotary(config, ops, max_model_len)

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(config, ops, f"{name}.self_attn", layer=index, rotary=rotary, window=windows[index], options=options)
        return pre_norm_layer(config, ops, name, attention, mlp(index))

    return Decoder(config, ops, layer)
