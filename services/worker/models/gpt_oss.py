"""GPT-OSS: attention with sinks, a window in every other layer, and a mixture of experts with a clamped gate.

Experts are asked for one by one; `headrace/models/expert_weights.py` finds them in the file's packed tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.models.model_config import ModelConfig
from services.worker.layers.blocks import (
    Attention,
    AttentionOptions,
    Block,
    Decoder,
    Mixture,
    MixtureOptions,
    hidden_act,
    model_rotary,
    pre_norm_layer,
)
from services.worker.layers.layer_types import FULL, SLIDING, layer_types, windows
from services.worker.layers.ops import ClampedSwiglu, Model, Ops


def gpt_oss(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    fields = config.fields
    rotary = model_rotary(config, ops, max_model_len)
    types = layer_types(config, [FULL if index % 2 else SLIDING for index in range(config.num_layers)])
    layer_windows = windows(config, types, fields.optional_size("sliding_window", default=128))
    if hidden_act(config) != "silu":
        raise fields.unsupported("hidden_act", hidden_act(config), "silu, which stands for the clamped gate")
    bias = fields.flag("attention_bias", default=True)
    attention_options = AttentionOptions(qkv_bias=bias, out_bias=bias, has_sinks=True)
    options = MixtureOptions(
        num_experts=fields.size("num_local_experts", default=128),
        top_k=fields.size("num_experts_per_tok", default=4),
        inner_size=config.intermediate_size,
        activation=ClampedSwiglu(
            alpha=fields.positive("swiglu_alpha", default=1.702), limit=fields.positive("swiglu_limit", default=7.0)
        ),
        bias=True,
        router="router",
    )

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(
            config,
            ops,
            f"{name}.self_attn",
            layer=index,
            rotary=rotary,
            window=layer_windows[index],
            options=attention_options,
        )
        return pre_norm_layer(config, ops, name, attention, Mixture(config, ops, f"{name}.mlp", options))

    return Decoder(config, ops, layer)
