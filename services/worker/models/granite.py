"""Granite 3, dense: Llama with a factor each for embedding, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.models.model_config import ModelConfig
from services.worker.layers.blocks import (
    Attention,
    AttentionOptions,
    Block,
    Decoder,
    DecoderOptions,
    GatedMlp,
    Residual,
    RmsNorm,
    hidden_act,
    model_rotary,
)
from services.worker.layers.ops import Model, Ops


def granite(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    fields = config.fields
    rotary = model_rotary(config, ops, max_model_len)
    activation = hidden_act(config)
    mlp_bias, attention_bias = fields.flag("mlp_bias"), fields.flag("attention_bias")
    residual = fields.positive("residual_multiplier", default=1.0)
    options = AttentionOptions(
        qkv_bias=attention_bias, out_bias=attention_bias, scale=fields.positive("attention_multiplier", default=1.0)
    )
    decoder = DecoderOptions(
        embed_scale=fields.positive("embedding_multiplier", default=1.0),
        logit_scale=1.0 / fields.positive("logits_scaling", default=1.0),
    )

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(config, ops, f"{name}.self_attn", layer=index, rotary=rotary, options=options)
        mlp = GatedMlp(config, ops, f"{name}.mlp", activation=activation, bias=mlp_bias)
        return (
            Residual(attention, before=RmsNorm(config, ops, f"{name}.input_layernorm"), scale=residual),
            Residual(mlp, before=RmsNorm(config, ops, f"{name}.post_attention_layernorm"), scale=residual),
        )

    return Decoder(config, ops, layer, decoder)
