"""BERT encoders (BERT, MiniLM, E5, BGE): learned positions, attention in both directions, blocks normed after they are added.

Gives one vector a row, pooled as the model directory says.
"""

from __future__ import annotations

from headrace.models.model_config import ModelConfig
from headrace.models.pooling_config import Pooling
from services.worker.layers.config_check import check_all_read
from services.worker.layers.ops import AttentionSpec, Model, Ops, Value, Vector, check_activation, stacked_matrix


class Bert:
    """See `EncoderBuilder`."""

    def __init__(self, config: ModelConfig, ops: Ops, *, pooling: Pooling) -> None:
        fields = config.fields
        if config.rope.scaling is not None:
            raise fields.unsupported("rope_scaling", config.rope.scaling, "none: BERT learns its positions")
        if fields.text("position_embedding_type", default="absolute") != "absolute":
            raise fields.unsupported("position_embedding_type", fields.get("position_embedding_type"), "absolute")
        eps = fields.positive("layer_norm_eps")
        activation = check_activation(fields.text("hidden_act", default="gelu"))
        num_segments = fields.size("type_vocab_size", default=2)
        check_all_read(config)
        self._pooling = pooling
        width = config.hidden_size
        self._words = ops.table("embeddings.word_embeddings.weight", (config.vocab_size, width))
        self._positions = ops.table("embeddings.position_embeddings.weight", (config.max_position_embeddings, width))
        self._segments = ops.table("embeddings.token_type_embeddings.weight", (num_segments, width))
        self._norm = _LayerNorm(ops, "embeddings.LayerNorm", width, eps)
        layers = ops.map_layers(lambda layer: _Layer(config, ops, layer, eps=eps, activation=activation), config.num_layers)
        self._layers = list(layers)
        # What is made of the first token's vector for classifying; vectors are taken before it.
        ops.skip_under("pooler.")
        ops.skip("embeddings.position_ids")

    def forward(self, ops: Ops) -> Value:
        """See `Model.forward`."""
        hidden = ops.add(ops.embed(self._words), ops.embed(self._segments, by="segment"))
        hidden = self._norm.forward(ops, ops.add(hidden, ops.embed(self._positions, by="position")))
        for layer in self._layers:
            hidden = layer.forward(ops, hidden)
        return ops.pooled(hidden, self._pooling)


class _LayerNorm:
    def __init__(self, ops: Ops, name: str, size: int, eps: float) -> None:
        self._weight: Vector = ops.vector(f"{name}.weight", size)
        self._bias: Vector = ops.vector(f"{name}.bias", size)
        self._eps = eps

    def forward(self, ops: Ops, x: Value) -> Value:
        return ops.layer_norm(x, self._weight, self._bias, eps=self._eps)


class _Layer:
    def __init__(self, config: ModelConfig, ops: Ops, layer: int, *, eps: float, activation: str) -> None:
        name = f"encoder.layer.{layer}"
        width, inner = config.hidden_size, config.intermediate_size
        projections = {f"{name}.attention.self.{part}": width for part in ("query", "key", "value")}
        self._qkv = stacked_matrix(ops, projections, width, bias=True)
        self._out = stacked_matrix(ops, {f"{name}.attention.output.dense": width}, width, bias=True)
        self._attention_norm = _LayerNorm(ops, f"{name}.attention.output.LayerNorm", width, eps)
        self._up = stacked_matrix(ops, {f"{name}.intermediate.dense": inner}, width, bias=True)
        self._down = stacked_matrix(ops, {f"{name}.output.dense": width}, inner, bias=True)
        self._norm = _LayerNorm(ops, f"{name}.output.LayerNorm", width, eps)
        self._activation = activation
        self._spec = AttentionSpec(
            layer=layer,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            is_causal=False,
        )

    def forward(self, ops: Ops, x: Value) -> Value:
        attended = ops.linear(ops.attend(ops.linear(x, self._qkv), self._spec), self._out)
        hidden = self._attention_norm.forward(ops, ops.add(x, attended))
        inner = ops.activated(ops.linear(hidden, self._up), self._activation)
        return self._norm.forward(ops, ops.add(hidden, ops.linear(inner, self._down)))


def bert(config: ModelConfig, ops: Ops, *, pooling: Pooling) -> Model:
    """See `EncoderBuilder`."""
    return Bert(config, ops, pooling=pooling)
