"""OLMo 2 and OLMo 3: blocks are normed after, not before, queries and keys over all heads; OLMo 3 has windows in most layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.models.model_config import ModelConfig, RopeConfig
from services.worker.layers.blocks import (
    Attention,
    AttentionOptions,
    Block,
    Decoder,
    GatedMlp,
    Residual,
    RmsNorm,
    hidden_act,
    model_rotary,
)
from services.worker.layers.layer_types import FULL, SLIDING, layer_types, windows
from services.worker.layers.ops import Model, Ops, Rotary


def olmo2(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    types = (FULL,) * config.num_layers
    return _olmo(config, ops, types, {FULL: model_rotary(config, ops, max_model_len)}, window=None)


def olmo3(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`; positions are scaled in layers without a window only, where the file does not say otherwise."""
    types = layer_types(config, [SLIDING if (index + 1) % 4 else FULL for index in range(config.num_layers)])
    plain = RopeConfig(config.rope.theta, config.rope.rotary_factor)
    rotaries = {
        FULL: model_rotary(config, ops, max_model_len),
        SLIDING: model_rotary(config, ops, max_model_len, config.ropes_by_layer_type.get(SLIDING, plain)),
    }
    return _olmo(config, ops, types, rotaries, window=config.fields.optional_size("sliding_window", default=4096))


def _olmo(config: ModelConfig, ops: Ops, types: Sequence[str], rotaries: Mapping[str, Rotary], *, window: int | None) -> Model:
    layer_windows = windows(config, types, window)
    activation = hidden_act(config)
    bias = config.fields.flag("attention_bias")
    options = AttentionOptions(qkv_bias=bias, out_bias=bias, qk_norm="row")

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(
            config,
            ops,
            f"{name}.self_attn",
            layer=index,
            rotary=rotaries[types[index]],
            window=layer_windows[index],
            options=options,
        )
        mlp = GatedMlp(config, ops, f"{name}.mlp", activation=activation)
        return (
            Residual(attention, after=RmsNorm(config, ops, f"{name}.post_attention_layernorm")),
            Residual(mlp, after=RmsNorm(config, ops, f"{name}.post_feedforward_layernorm")),
        )

    return Decoder(config, ops, layer)
