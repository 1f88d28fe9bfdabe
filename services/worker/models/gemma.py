"""Gemma 2 and Gemma 3, the text model: blocks normed before and after, scaled embeddings, layers with and without a window.

Norms are stored as their distance from 1. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys instead, and turns them
faster in layers with a window. Of a Gemma 3 that takes images the text part is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from headrace.models.model_config import ModelConfig, RopeConfig
from services.worker.layers.blocks import (
    Attention,
    AttentionOptions,
    Block,
    Decoder,
    DecoderOptions,
    GatedMlp,
    Residual,
    RmsNorm,
    model_rotary,
)
from services.worker.layers.layer_types import FULL, SLIDING, layer_types, windows
from services.worker.layers.ops import Model, Ops, Rotary, check_activation

_SHIFT: Final = 1.0
_IMAGE_PARTS: Final = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def gemma2(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    fields = config.fields
    types = layer_types(config, [FULL if index % 2 else SLIDING for index in range(config.num_layers)])
    options = AttentionOptions(
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        norm_shift=_SHIFT,
        scale=fields.positive("query_pre_attn_scalar", default=256) ** -0.5,
        soft_cap=fields.optional_positive("attn_logit_softcapping", default=50.0),
    )
    logit_cap = fields.optional_positive("final_logit_softcapping", default=30.0)
    rotary = model_rotary(config, ops, max_model_len)
    return _gemma(config, ops, types, {FULL: rotary, SLIDING: rotary}, options, DecoderOptions(logit_cap=logit_cap))


def gemma3(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """See `ModelBuilder`."""
    fields = config.fields
    period = fields.size("sliding_window_pattern", default=6)
    types = layer_types(config, [SLIDING if (index + 1) % period else FULL for index in range(config.num_layers)])
    options = AttentionOptions(
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        qk_norm="head",
        norm_shift=_SHIFT,
        scale=fields.positive("query_pre_attn_scalar", default=256) ** -0.5,
    )
    local_rope = RopeConfig(fields.positive("rope_local_base_freq", default=10_000.0))
    rotaries = {
        FULL: model_rotary(config, ops, max_model_len),
        SLIDING: model_rotary(config, ops, max_model_len, config.ropes_by_layer_type.get(SLIDING, local_rope)),
    }
    fields.get("vision_config")
    for part in _IMAGE_PARTS:
        ops.skip_under(part)
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    prefix = next((each for each in prefixes if ops.has(f"{each}embed_tokens.weight")), prefixes[0])
    # A tied matrix that is stored a second time has the prefix of the text model.
    ops.skip("language_model.lm_head.weight")
    logit_cap = fields.optional_positive("final_logit_softcapping")
    return _gemma(config, ops, types, rotaries, options, DecoderOptions(prefix=prefix, logit_cap=logit_cap))


def _gemma(
    config: ModelConfig,
    ops: Ops,
    types: Sequence[str],
    rotaries: dict[str, Rotary],
    options: AttentionOptions,
    decoder: DecoderOptions,
) -> Model:
    layer_windows = windows(config, types, config.fields.optional_size("sliding_window", default=4096))
    # A second name, `hidden_act`, is in old files and was never meant.
    config.fields.get("hidden_act")
    activation = check_activation(config.fields.text("hidden_activation", default="gelu_pytorch_tanh"))

    def layer(index: int) -> Sequence[Block]:
        name = f"{decoder.prefix}layers.{index}"
        norm = partial(RmsNorm, config, ops, shift=_SHIFT)
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
            Residual(attention, before=norm(f"{name}.input_layernorm"), after=norm(f"{name}.post_attention_layernorm")),
            Residual(mlp, before=norm(f"{name}.pre_feedforward_layernorm"), after=norm(f"{name}.post_feedforward_layernorm")),
        )

    scaled = DecoderOptions(
        prefix=decoder.prefix, embed_scale=config.hidden_size**0.5, norm_shift=_SHIFT, logit_cap=decoder.logit_cap
    )
    return Decoder(config, ops, layer, scaled)
