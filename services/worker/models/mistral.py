"""Mistral: Llama without biases, with a window in all layers where the file has one."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.models.model_config import ModelConfig
from services.worker.layers.blocks import Attention, Block, Decoder, GatedMlp, hidden_act, model_rotary, pre_norm_layer
from services.worker.layers.ops import Model, Ops


def mistral(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    rotary = model_rotary(config, ops, max_model_len)
    activation = hidden_act(config)
    window = config.fields.optional_size("sliding_window", default=4096)

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(config, ops, f"{name}.self_attn", layer=index, rotary=rotary, window=window)
        mlp = GatedMlp(config, ops, f"{name}.mlp", activation=activation)
        return pre_norm_layer(config, ops, name, attention, mlp)

    return Decoder(config, ops, layer)
