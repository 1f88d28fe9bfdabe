"""Llama 2, 3 and 3.x, SmolLM2, and whatever else names `LlamaForCausalLM`.

Pre-norm layers of grouped-query attention with rotary embedding and a gated feed-forward block.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.models.model_config import ModelConfig
from services.worker.layers.blocks import (
    Attention,
    AttentionOptions,
    Block,
    Decoder,
    GatedMlp,
    hidden_act,
    model_rotary,
    pre_norm_layer,
)
from services.worker.layers.ops import Model, Ops


def llama(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    rotary = model_rotary(config, ops, max_model_len)
    activation = hidden_act(config)
    mlp_bias, attention_bias = config.fields.flag("mlp_bias"), config.fields.flag("attention_bias")
    options = AttentionOptions(qkv_bias=attention_bias, out_bias=attention_bias)

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(config, ops, f"{name}.self_attn", layer=index, rotary=rotary, options=options)
        mlp = GatedMlp(config, ops, f"{name}.mlp", activation=activation, bias=mlp_bias)
        return pre_norm_layer(config, ops, name, attention, mlp)

    return Decoder(config, ops, layer)
