"""Parts that decoder families share, in operations: norms, attention, feed-forward blocks, residual blocks, and the whole decoder.

A family puts them together and says what it has of its own; see `models/`. Names are those of Hugging Face's checkpoints, which
most families share too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from headrace.models.model_config import ModelConfig, RopeConfig
from services.worker.layers.config_check import check_all_read
from services.worker.layers.ops import (
    AttentionSpec,
    ClampedSwiglu,
    MixtureSpec,
    Ops,
    Rotary,
    Value,
    check_activation,
    stacked_matrix,
)
from services.worker.layers.rotary import rotary_tables


class Block(Protocol):
    """Part of a network: values in, values out, as many rows."""

    def forward(self, ops: Ops, x: Value) -> Value:
        """State the operations of one step."""
        ...


class RmsNorm:
    """RMS norm.

    Args:
        config: Gives width and epsilon.
        ops: Where the weight comes from.
        name: The weight's name without `.weight`.
        shift: Added to the weight.
    """

    def __init__(self, config: ModelConfig, ops: Ops, name: str, *, shift: float = 0.0) -> None:
        self._weight = ops.vector(f"{name}.weight", config.hidden_size, shift=shift)
        self._eps = config.rms_norm_eps

    def forward(self, ops: Ops, x: Value) -> Value:
        """See `Block.forward`."""
        return ops.rms_norm(x, self._weight, eps=self._eps)


class Residual:
    """`x + scale * after(inner(before(x)))`.

    Args:
        inner: Attention or feed-forward.
        before: Norm of what goes in; None without.
        after: Norm of what comes out; None without.
        scale: Factor of what is added.
    """

    def __init__(self, inner: Block, *, before: Block | None = None, after: Block | None = None, scale: float = 1.0) -> None:
        self._blocks = [block for block in (before, inner, after) if block is not None]
        self._scale = scale

    def forward(self, ops: Ops, x: Value) -> Value:
        """See `Block.forward`."""
        y = x
        for block in self._blocks:
            y = block.forward(ops, y)
        return ops.add(x, y, scale=self._scale)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What families differ in, the same for all layers of one.

    Attributes:
        qkv_bias: Whether the projections to queries, keys and values have biases.
        out_bias: Whether the output projection has one.
        is_fused: Whether the file holds queries, keys and values as one matrix, `qkv_proj`.
        qk_norm: RMS norms of queries and keys: over each head, or over the whole row of heads.
        norm_shift: Added to the weights of these norms.
        scale: Factor of the scores; None for `head_dim ** -0.5`.
        soft_cap: See `AttentionSpec`.
        has_sinks: Whether each head has a sink.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    is_fused: bool = False
    qk_norm: Literal["head", "row"] | None = None
    norm_shift: float = 0.0
    scale: float | None = None
    soft_cap: float | None = None
    has_sinks: bool = False


class Attention:
    """Grouped-query attention between its projections.

    Args:
        config: Gives the sizes.
        ops: Where weights come from.
        name: For example `model.layers.0.self_attn`.
        layer: Which layer's pages it uses.
        rotary: Rotary tables; None for a layer without positions.
        window: See `AttentionSpec`.
        options: The family's own.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        name: str,
        *,
        layer: int,
        rotary: Rotary | None,
        window: int | None = None,
        options: AttentionOptions = AttentionOptions(),
    ) -> None:
        hidden, head_dim = config.hidden_size, config.head_dim
        query_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        projections = {f"{name}.q_proj": query_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size}
        if options.is_fused:
            projections = {f"{name}.qkv_proj": query_size + 2 * kv_size}
        self._qkv = stacked_matrix(ops, projections, hidden, bias=options.qkv_bias)
        self._out = stacked_matrix(ops, {f"{name}.o_proj": hidden}, query_size, bias=options.out_bias)
        q_norm = k_norm = None
        if options.qk_norm is not None:
            sizes = (head_dim, head_dim) if options.qk_norm == "head" else (query_size, kv_size)
            q_norm = ops.vector(f"{name}.q_norm.weight", sizes[0], shift=options.norm_shift)
            k_norm = ops.vector(f"{name}.k_norm.weight", sizes[1], shift=options.norm_shift)
        self._spec = AttentionSpec(
            layer=layer,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if options.scale is None else options.scale,
            rotary=rotary,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=config.rms_norm_eps,
            window=window,
            soft_cap=options.soft_cap,
            sinks=ops.vector(f"{name}.sinks", config.num_heads) if options.has_sinks else None,
        )

    def forward(self, ops: Ops, x: Value) -> Value:
        """See `Block.forward`."""
        return ops.linear(ops.attend(ops.linear(x, self._qkv), self._spec), self._out)


class GatedMlp:
    """Feed-forward block with a gate.

    Args:
        config: Gives the sizes.
        ops: Where weights come from.
        name: For example `model.layers.0.mlp`.
        activation: Of the gate, as config.json names it.
        bias: Whether the projections have biases.
        is_fused: Whether the file holds gate and up as one matrix, `gate_up_proj`.
    """

    def __init__(
        self, config: ModelConfig, ops: Ops, name: str, *, activation: str, bias: bool = False, is_fused: bool = False
    ) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self._activation = activation
        gates = {f"{name}.gate_up_proj": 2 * inner} if is_fused else {f"{name}.gate_proj": inner, f"{name}.up_proj": inner}
        self._gate_up = stacked_matrix(ops, gates, hidden, bias=bias)
        self._down = stacked_matrix(ops, {f"{name}.down_proj": hidden}, inner, bias=bias)

    def forward(self, ops: Ops, x: Value) -> Value:
        """See `Block.forward`."""
        return ops.linear(ops.gated(ops.linear(x, self._gate_up), self._activation), self._down)


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """What families with experts differ in.

    Attributes:
        num_experts: Experts a layer.
        top_k: Experts a token.
        inner_size: Size between an expert's projections.
        activation: See `MixtureSpec`.
        is_normalized: See `MixtureSpec`.
        bias: Whether router and experts have biases.
        router: Name of the router in the layer.
        gate_up_down: Names of an expert's three projections.
    """

    num_experts: int
    top_k: int
    inner_size: int
    activation: str | ClampedSwiglu
    is_normalized: bool = True
    bias: bool = False
    router: str = "gate"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


class Mixture:
    """Mixture of experts.

    Args:
        config: Gives the width.
        ops: Where weights come from.
        name: For example `model.layers.0.mlp`.
        options: The family's own.

    Raises:
        ModelError: A token is to go through more experts than there are.
    """

    def __init__(self, config: ModelConfig, ops: Ops, name: str, options: MixtureOptions) -> None:
        hidden, inner = config.hidden_size, options.inner_size
        gate, up, down = options.gate_up_down
        if options.top_k > options.num_experts:
            what = f"is {options.top_k}, but there are {options.num_experts} experts"
            raise config.fields.bad("num_experts_per_tok", what)
        prefixes = [f"{name}.experts.{expert}" for expert in range(options.num_experts)]
        into = [[(f"{prefix}.{part}.weight", (inner, hidden)) for part in (gate, up)] for prefix in prefixes]
        back = [[(f"{prefix}.{down}.weight", (hidden, inner))] for prefix in prefixes]
        into_biases = [[(f"{prefix}.{part}.bias", (inner,)) for part in (gate, up)] for prefix in prefixes]
        back_biases = [[(f"{prefix}.{down}.bias", (hidden,))] for prefix in prefixes]
        self._spec = MixtureSpec(
            router=stacked_matrix(ops, {f"{name}.{options.router}": options.num_experts}, hidden, bias=options.bias),
            gate_up=ops.experts(into, into_biases if options.bias else ()),
            down=ops.experts(back, back_biases if options.bias else ()),
            top_k=options.top_k,
            is_normalized=options.is_normalized,
            activation=options.activation,
        )

    def forward(self, ops: Ops, x: Value) -> Value:
        """See `Block.forward`."""
        return ops.mixture(x, self._spec)


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """What families differ in round their layers.

    Attributes:
        prefix: What stands before the names of embedding, layers and last norm.
        embed_scale: Factor of the embedding.
        norm_shift: Added to the last norm's weight.
        logit_scale: Factor of the logits.
        logit_cap: Logits become `logit_cap * tanh(logit / logit_cap)`; None without.
    """

    prefix: str = "model."
    embed_scale: float = 1.0
    norm_shift: float = 0.0
    logit_scale: float = 1.0
    logit_cap: float | None = None


class Decoder:
    """A whole decoder, from tokens to logits; see `Model`.

    Args:
        config: Shape of the model; whatever of it the family uses was read by now.
        ops: Where weights come from.
        build_layer: Makes the blocks of one layer, given its number; called by several threads at once.
        options: The family's own.

    Raises:
        ModelError: config.json has a field that changes what a network computes, and that the family does not know.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        build_layer: Callable[[int], Sequence[Block]],
        options: DecoderOptions = DecoderOptions(),
    ) -> None:
        check_all_read(config)
        self._options = options
        layers = ops.map_layers(build_layer, config.num_layers)
        # Where the layers are loaded by threads, these are at it by now.
        table_shape = (config.vocab_size, config.hidden_size)
        self._embedding = ops.table(f"{options.prefix}embed_tokens.weight", table_shape)
        self._blocks = [block for layer in layers for block in layer]
        self._norm = RmsNorm(config, ops, f"{options.prefix}norm", shift=options.norm_shift)
        if config.tie_word_embeddings:
            # Some files store the tied matrix a second time.
            ops.skip("lm_head.weight")
            self._lm_head = ops.tied(self._embedding)
        else:
            self._lm_head = ops.matrix([("lm_head.weight", table_shape)])

    def forward(self, ops: Ops) -> Value:
        """See `Model.forward`."""
        options = self._options
        hidden = ops.embed(self._embedding, scale=options.embed_scale)
        for block in self._blocks:
            hidden = block.forward(ops, hidden)
        logits = ops.linear(self._norm.forward(ops, ops.sampled(hidden)), self._lm_head)
        if options.logit_scale != 1.0:
            logits = ops.scaled(logits, options.logit_scale)
        return logits if options.logit_cap is None else ops.soft_cap(logits, options.logit_cap)


def pre_norm_layer(config: ModelConfig, ops: Ops, name: str, attention: Block, mlp: Block) -> tuple[Block, Block]:
    """Make the layer that most families have: each block's input is normed.

    Args:
        config: Shape of the model.
        ops: Where weights come from.
        name: For example `model.layers.0`.
        attention: Attention.
        mlp: Feed-forward.
    """
    return (
        Residual(attention, before=RmsNorm(config, ops, f"{name}.input_layernorm")),
        Residual(mlp, before=RmsNorm(config, ops, f"{name}.post_attention_layernorm")),
    )


def model_rotary(config: ModelConfig, ops: Ops, max_model_len: int, rope: RopeConfig | None = None) -> Rotary:
    """Make rotary tables for `max_model_len` positions: of config.json's one rope, or of the one given."""
    tables = rotary_tables(
        config.rope if rope is None else rope,
        head_dim=config.head_dim,
        context=config.max_position_embeddings,
        max_position=max_model_len,
    )
    return ops.rotary(tables)


def hidden_act(config: ModelConfig) -> str:
    """Read `hidden_act`.

    Raises:
        ModelError: It is not supported.
    """
    return check_activation(config.fields.text("hidden_act", default="silu"))
