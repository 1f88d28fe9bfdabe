"""Phi 3, 3.5 and 4 (mini and 14B): Llama with fused projections in the file, and a part of each head turned in some sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.models.model_config import ModelConfig, RopeConfig
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


def phi3(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    rotary = model_rotary(config, ops, max_model_len, _rope(config))
    activation = hidden_act(config)
    window = config.fields.optional_size("sliding_window")
    options = AttentionOptions(is_fused=True)

    def layer(index: int) -> Sequence[Block]:
        name = f"model.layers.{index}"
        attention = Attention(config, ops, f"{name}.self_attn", layer=index, rotary=rotary, window=window, options=options)
        mlp = GatedMlp(config, ops, f"{name}.mlp", activation=activation, is_fused=True)
        return pre_norm_layer(config, ops, name, attention, mlp)

    return Decoder(config, ops, layer)


def _rope(config: ModelConfig) -> RopeConfig:
    """Old files call longrope `su` or `yarn`."""
    scaling = config.rope.scaling
    if scaling is None or scaling["rope_type"] not in ("su", "yarn"):
        return config.rope
    # For `su`, which is not known by this name elsewhere, the original length was not taken up with the rest.
    origin = config.fields.size("original_max_position_embeddings", default=config.max_position_embeddings)
    renamed = {**scaling, "rope_type": "longrope", "original_max_position_embeddings": origin}
    return replace(config.rope, scaling=renamed)
