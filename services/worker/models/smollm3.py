"""SmolLM3: Llama in which every fourth layer has no positions."""

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
from services.worker.layers.layer_types import FULL, SLIDING, layer_types, windows
from services.worker.layers.ops import Model, Ops


def smollm3(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    fields = config.fields
    rotary = model_rotary(config, ops, max_model_len)
    activation = hidden_act(config)
    mlp_bias, attention_bias = fields.flag("mlp_bias"), fields.flag("attention_bias")
    options = AttentionOptions(qkv_bias=attention_bias, out_bias=attention_bias)
    period = fields.size("no_rope_layer_interval", default=4)
    # Despite its name, a 1 stands for a layer with positions.
    has_rope = fields.list_of("no_rope_layers", int, length=config.num_layers)
    if has_rope is None:
        has_rope = [int((index + 1) % period != 0) for index in range(config.num_layers)]
    is_windowed, window = fields.flag("use_sliding_window"), fields.optional_size("sliding_window")
    has_window = is_windowed and window is not None
    types = layer_types(config, [SLIDING if has_window and not rope else FULL for rope in has_rope])
    layer_windows = windows(config, types, window) if is_windowed else (None,) * config.num_layers

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(
            config,
            ops,
            f"{name}.self_attn",
            layer=index,
            rotary=rotary if has_rope[index] else None,
            window=layer_windows[index],
            options=options,
        )
        mlp = GatedMlp(config, ops, f"{name}.mlp", activation=activation, bias=mlp_bias)
        return pre_norm_layer(config, ops, name, attention, mlp)

    return Decoder(config, ops, layer)
