"""The Llama architecture: Llama 2, 3 and 3.x, SmolLM2, and whatever else names `LlamaForCausalLM`.

Pre-norm layers of grouped-query attention with rotary embedding and a gated feed-forward block. Queries, keys and values are one
multiplication, gate and up another.
"""

from __future__ import annotations

from typing import Any

import torch

from headrace.models.model_config import ModelConfig
from services.worker.attention.backend import AttentionBackend, StepTensors
from services.worker.layers.embedding import Embedding
from services.worker.layers.linear import Linear
from services.worker.layers.mlp import GatedMlp
from services.worker.layers.rms_norm import RmsNorm
from services.worker.layers.rotary import Rotary
from services.worker.weights import WeightLoader


class LlamaForCausalLM:
    """The network; holds weights, knows nothing of sequences.

    Args:
        config: Shape of the model.
        weights: Where its tensors come from; their type is the type of the computation.
        attention: The attention backend.
        max_model_len: Positions to prepare for, in tokens.

    Raises:
        ModelError: A tensor is missing, has another shape, or is left over; or the model needs what is not supported.
    """

    def __init__(self, config: ModelConfig, weights: WeightLoader, attention: AttentionBackend[Any], *, max_model_len: int) -> None:
        self._attention = attention
        self._rotary = Rotary(
            config.head_dim,
            max_position=max_model_len,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            dtype=weights.dtype,
        )
        table_shape = (config.vocab_size, config.hidden_size)
        prefixes = [f"model.layers.{layer}" for layer in range(config.num_layers)]
        layers = weights.map(lambda prefix: _Layer(config, weights, attention, prefix=prefix), prefixes)
        # Where the layers are loaded by threads, these are at it by now.
        self._embedding = Embedding(weights.take("model.embed_tokens.weight", table_shape))
        self._layers = list(layers)
        self._norm = RmsNorm(weights.take("model.norm.weight", (config.hidden_size,)), eps=config.rms_norm_eps)
        if config.tie_word_embeddings:
            # Some files store the tied matrix a second time.
            weights.skip("lm_head.weight")
            self._lm_head = Linear(self._embedding.weight)
        else:
            self._lm_head = Linear(weights.take("lm_head.weight", table_shape))

    def forward(self, step: StepTensors, kv_layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute one step; writes its keys and values.

        Returns:
            float32 logits `[num_sampled, vocab_size]` of the step's sampled tokens.
        """
        prepared = self._attention.prepare(step)
        rotary_rows = self._rotary.rows(step.positions)
        hidden = self._embedding(step.token_ids)
        for layer, layer_pages in zip(self._layers, kv_layers, strict=True):
            hidden = layer.forward(hidden, rotary_rows, self._rotary, prepared, layer_pages)
        return self._lm_head(self._norm(hidden.index_select(0, step.sampled_tokens))).float()


class _Layer:
    def __init__(self, config: ModelConfig, weights: WeightLoader, attention: AttentionBackend[Any], *, prefix: str) -> None:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._attention = attention
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._input_norm = RmsNorm(weights.take(f"{prefix}.input_layernorm.weight", (hidden,)), eps=config.rms_norm_eps)
        self._post_norm = RmsNorm(weights.take(f"{prefix}.post_attention_layernorm.weight", (hidden,)), eps=config.rms_norm_eps)
        attn = f"{prefix}.self_attn"
        projections = {f"{attn}.q_proj": query_size, f"{attn}.k_proj": kv_size, f"{attn}.v_proj": kv_size}
        self._qkv = _stacked_linear(weights, projections, hidden, bias=config.attention_bias)
        self._o_proj = _stacked_linear(weights, {f"{attn}.o_proj": hidden}, query_size, bias=config.attention_bias)
        gates = {f"{prefix}.mlp.gate_proj": intermediate, f"{prefix}.mlp.up_proj": intermediate}
        self._mlp = GatedMlp(
            _stacked_linear(weights, gates, hidden, bias=config.mlp_bias),
            _stacked_linear(weights, {f"{prefix}.mlp.down_proj": hidden}, intermediate, bias=config.mlp_bias),
            activation=config.hidden_act,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        rotary_rows: tuple[torch.Tensor, torch.Tensor],
        rotary: Rotary,
        prepared: Any,
        layer_pages: torch.Tensor,
    ) -> torch.Tensor:
        num_rotated = self._num_heads + self._num_kv_heads
        heads = self._qkv(self._input_norm(hidden)).view(hidden.shape[0], -1, self._head_dim)
        rotary.apply_(heads[:, :num_rotated], rotary_rows)
        keys_values = heads[:, self._num_heads :].unflatten(1, (2, self._num_kv_heads))
        attended = self._attention.attend(prepared, layer_pages, heads[:, : self._num_heads], keys_values)
        hidden = hidden + self._o_proj(attended)
        return hidden + self._mlp(self._post_norm(hidden))


def _stacked_linear(weights: WeightLoader, out_features: dict[str, int], in_features: int, *, bias: bool) -> Linear:
    """Read projections of one input as a single matrix; `out_features` maps names to sizes, in order."""
    matrix = weights.take_stacked([(f"{name}.weight", (size, in_features)) for name, size in out_features.items()])
    if not bias:
        return Linear(matrix)
    return Linear(matrix, weights.take_stacked([(f"{name}.bias", (size,)) for name, size in out_features.items()]))
