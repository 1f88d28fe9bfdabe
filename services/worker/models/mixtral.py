"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.models.model_config import ModelConfig
from services.worker.layers.blocks import (
    Attention,
    Block,
    Decoder,
    Mixture,
    MixtureOptions,
    hidden_act,
    model_rotary,
    pre_norm_layer,
)
from services.worker.layers.ops import Model, Ops


def mixtral(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    rotary = model_rotary(config, ops, max_model_len)
    window = config.fields.optional_size("sliding_window")
    options = MixtureOptions(
        num_experts=config.fields.size("num_local_experts", default=8),
        top_k=config.fields.size("num_experts_per_tok", default=2),
        inner_size=config.intermediate_size,
        activation=hidden_act(config),
        gate_up_down=("w1", "w3", "w2"),
    )

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(config, ops, f"{name}.self_attn", layer=index, rotary=rotary, window=window)
        mixture = Mixture(config, ops, f"{name}.block_sparse_moe", options)
        return pre_norm_layer(config, ops, name, attention, mixture)

    return Decoder(config, ops, layer)
