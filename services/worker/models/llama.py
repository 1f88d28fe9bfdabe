"""The Llama architecture: Llama 2, 3 and 3.x, SmolLM2, and whatever else names `LlamaForCausalLM`.

Pre-norm layers of grouped-query attention with rotary embedding and a gated feed-forward block. Queries, keys and values are one
multiplication, gate and up another.
"""

from __future__ import annotations

from headrace.models.model_config import ModelConfig
from services.worker.layers.ops import AttentionSpec, Ops, Rotary, Value, check_activation, stacked_matrix
from services.worker.layers.rotary import rotary_tables


class LlamaForCausalLM:
    """See `Model`.

    Args:
        config: Shape of the model.
        ops: Where weight handles come from.
        max_model_len: Positions to prepare for, in tokens.

    Raises:
        ModelError: A tensor is missing or has another shape, or the model needs what is not supported.
    """

    def __init__(self, config: ModelConfig, ops: Ops, *, max_model_len: int) -> None:
        tables = rotary_tables(config.head_dim, max_position=max_model_len, theta=config.rope_theta, scaling=config.rope_scaling)
        rotary = ops.rotary(tables)
        self._eps = config.rms_norm_eps
        layers = ops.map_layers(lambda layer: _Layer(config, ops, rotary, layer=layer), config.num_layers)
        # Where the layers are loaded by threads, these are at it by now.
        table_shape = (config.vocab_size, config.hidden_size)
        self._embedding = ops.table("model.embed_tokens.weight", table_shape)
        self._layers = list(layers)
        self._norm = ops.vector("model.norm.weight", config.hidden_size)
        if config.tie_word_embeddings:
            # Some files store the tied matrix a second time.
            ops.skip("lm_head.weight")
            self._lm_head = ops.tied(self._embedding)
        else:
            self._lm_head = ops.matrix([("lm_head.weight", table_shape)])

    def forward(self, ops: Ops) -> Value:
        """See `Model.forward`."""
        hidden = ops.embed(self._embedding)
        for layer in self._layers:
            hidden = layer.forward(ops, hidden)
        return ops.linear(ops.rms_norm(ops.sampled(hidden), self._norm, eps=self._eps), self._lm_head)


class _Layer:
    def __init__(self, config: ModelConfig, ops: Ops, rotary: Rotary, *, layer: int) -> None:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        prefix = f"model.layers.{layer}"
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self._eps = config.rms_norm_eps
        self._activation = check_activation(config.hidden_act)
        self._input_norm = ops.vector(f"{prefix}.input_layernorm.weight", hidden)
        self._post_norm = ops.vector(f"{prefix}.post_attention_layernorm.weight", hidden)
        projections = {f"{attn}.q_proj": query_size, f"{attn}.k_proj": kv_size, f"{attn}.v_proj": kv_size}
        self._qkv = stacked_matrix(ops, projections, hidden, bias=config.attention_bias)
        self._o_proj = stacked_matrix(ops, {f"{attn}.o_proj": hidden}, query_size, bias=config.attention_bias)
        gates = {f"{mlp}.gate_proj": intermediate, f"{mlp}.up_proj": intermediate}
        self._gate_up = stacked_matrix(ops, gates, hidden, bias=config.mlp_bias)
        self._down = stacked_matrix(ops, {f"{mlp}.down_proj": hidden}, intermediate, bias=config.mlp_bias)
        self._attention = AttentionSpec(
            layer=layer,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            rotary=rotary,
        )

    def forward(self, ops: Ops, hidden: Value) -> Value:
        qkv = ops.linear(ops.rms_norm(hidden, self._input_norm, eps=self._eps), self._qkv)
        hidden = ops.add(hidden, ops.linear(ops.attend(qkv, self._attention), self._o_proj))
        gate_up = ops.linear(ops.rms_norm(hidden, self._post_norm, eps=self._eps), self._gate_up)
        return ops.add(hidden, ops.linear(ops.gated(gate_up, self._activation), self._down))
