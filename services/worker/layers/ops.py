"""What a model family is written in: the operations of a network, and its weights as handles.

A family asks `Ops` for weight handles when it is built (`matrix`, `vector`, `table`, `rotary`) and, in its `forward`, strings
operations together. It never touches a tensor, so one short file serves every backend: `torch_ops.py` computes at once, on any
device that torch has; `native_ops.py` records the operations once, at load, as a program of native kernels.

Values are opaque to a family. A value has one row for each of the step's tokens; after `sampled`, one for each token whose logits
are wanted; after `pooled`, one for each row of the step. Values passed as `x` to `add` may be overwritten: a family does not use
them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from headrace.errors import ModelError
from headrace.models.pooling_config import Pooling
from services.worker.layers.rotary import RotaryTables

Layer = TypeVar("Layer")

Part = tuple[str, tuple[int, ...]]
"""A tensor's Hugging Face name and its shape."""

Value = Any
"""Rows of numbers on their way through the network; a tensor, or a place in a program."""

Matrix = Any
"""Weights of a linear layer, laid out for multiplication by the backend that made it."""

Vector = Any
"""A weight vector: scales, shifts, sinks."""

Table = Any
"""An embedding table."""

Rotary = Any
"""Rotary tables where the backend wants them."""

Experts = Any
"""Weights of one linear layer for each of several experts."""

Index = Literal["token", "position", "segment"]
"""What chooses a table's rows. Segments tell the parts of a pair of texts apart; a step has one segment so far, number 0."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """One attention layer: what happens between the projections to queries, keys and values and the output projection.

    Attributes:
        layer: Which layer's KV pages are read and written, from 0.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Size of a head.
        scale: Factor of the scores, mostly `head_dim ** -0.5`.
        rotary: Tables, or None for a layer without positions.
        q_norm: Scale of an RMS norm of the queries before rotation; None without. `[head_dim]` norms each head by itself,
            `[num_heads * head_dim]` all heads together.
        k_norm: The same for the keys.
        norm_eps: Epsilon of both.
        window: A token attends to this many tokens at most, itself included; None for all before it.
        soft_cap: Scores become `soft_cap * tanh(score / soft_cap)`; None without.
        sinks: `[num_heads]` scores of a key that takes weight and gives nothing; None without.
        is_causal: False for encoders: a token attends to all of its row, which is whole in the step, and no pages are kept.
            `layer`, `window`, `soft_cap` and `sinks` are then not looked at.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary | None = None
    q_norm: Vector | None = None
    k_norm: Vector | None = None
    norm_eps: float = 1e-6
    window: int | None = None
    soft_cap: float | None = None
    sinks: Vector | None = None
    is_causal: bool = True


@dataclass(frozen=True, slots=True)
class ClampedSwiglu:
    """GPT-OSS' gate: `g * sigmoid(alpha * g) * (u + 1)`, `g` clamped to at most `limit` and `u` to within `limit` of 0."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True, eq=False)
class MixtureSpec:
    """One mixture-of-experts layer: each token goes through the `top_k` experts that score highest.

    Attributes:
        router: `[num_experts, hidden_size]`: its product with a token is the experts' scores.
        gate_up: An expert's gate and up projections, stacked: the gate is the first half of each row.
        down: An expert's projection back.
        top_k: Experts a token.
        is_normalized: An expert's weight in the sum is its part of a softmax over the chosen experts' scores; False: over all.
        activation: As for `Ops.gated`, or the clamped gate.
    """

    router: Matrix
    gate_up: Experts
    down: Experts
    top_k: int
    is_normalized: bool
    activation: str | ClampedSwiglu


class WeightOps(Protocol):
    """Where a family's weights come from."""

    def map_layers(self, build: Callable[[int], Layer], num_layers: int) -> Iterator[Layer]:
        """Build the layers `0 … num_layers - 1`, several at a time where the loader has threads."""
        ...

    def has(self, name: str) -> bool:
        """Whether the files hold this tensor."""
        ...

    def skip(self, name: str) -> None:
        """Leave a tensor that the network does not need, if it is there."""
        ...

    def skip_under(self, prefix: str) -> None:
        """Leave all tensors whose names begin with a prefix."""
        ...

    def matrix(self, weights: Sequence[Part], biases: Sequence[Part] = ()) -> Matrix:
        """Read `[out_features, in_features]` tensors of one input, stacked along their rows, and their biases.

        Raises:
            ModelError: A tensor is missing or has another shape, or its type is not supported.
        """
        ...

    def experts(self, weights: Sequence[Sequence[Part]], biases: Sequence[Sequence[Part]] = ()) -> Experts:
        """Read one matrix an expert, each as `matrix` does; `biases` is empty or as long as `weights`.

        Raises:
            ModelError: As for `matrix`.
        """
        ...

    def vector(self, name: str, size: int, *, shift: float = 0.0) -> Vector:
        """Read a vector; `shift` is added to it, in float32 (Gemma stores scales minus one)."""
        ...

    def table(self, name: str, shape: tuple[int, int]) -> Table:
        """Read an embedding table `[num_rows, width]`."""
        ...

    def tied(self, table: Table) -> Matrix:
        """The table as the matrix of the output projection."""
        ...

    def rotary(self, tables: RotaryTables) -> Rotary:
        """Take rotary tables in; one handle may serve many layers."""
        ...


class ComputeOps(Protocol):
    """What a family's network is made of."""

    def embed(self, table: Table, *, scale: float = 1.0, by: Index = "token") -> Value:
        """Rows of the table for the step's tokens, chosen by each token's number, position or segment, times `scale`."""
        ...

    def rms_norm(self, x: Value, weight: Vector, *, eps: float) -> Value:
        """`x / sqrt(mean(x²) + eps) * weight` along a row. Source: Zhang and Sennrich (2019)."""
        ...

    def layer_norm(self, x: Value, weight: Vector, bias: Vector, *, eps: float) -> Value:
        """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` along a row. Source: Layer Normalization (2016)."""
        ...

    def linear(self, x: Value, matrix: Matrix) -> Value:
        """`x @ matrix.T + bias`."""
        ...

    def gated(self, gate_up: Value, activation: str) -> Value:
        """`activation(gate) * up`, the gate being the first half of each row; names as in config.json's `hidden_act`."""
        ...

    def activated(self, x: Value, activation: str) -> Value:
        """`activation(x)`; names as for `gated`."""
        ...

    def mixture(self, x: Value, spec: MixtureSpec) -> Value:
        """Send each token through its experts and add up what they give, weighted. Source: Shazeer et al. (2017)."""
        ...

    def add(self, x: Value, y: Value, *, scale: float = 1.0) -> Value:
        """`x + scale * y`."""
        ...

    def attend(self, qkv: Value, spec: AttentionSpec) -> Value:
        """Norm and rotate queries and keys, store keys and values in the layer's pages, and attend.

        Args:
            qkv: Rows of queries, keys and values, one after another.
            spec: The layer.

        Returns:
            Rows of `num_heads * head_dim`.
        """
        ...

    def sampled(self, x: Value) -> Value:
        """Keep the rows of the tokens whose logits are wanted."""
        ...

    def pooled(self, x: Value, pooling: Pooling) -> Value:
        """Make one vector of each row's tokens; rows are whole in the step."""
        ...

    def soft_cap(self, x: Value, cap: float) -> Value:
        """`cap * tanh(x / cap)`."""
        ...

    def scaled(self, x: Value, scale: float) -> Value:
        """`x * scale`."""
        ...


class Ops(WeightOps, ComputeOps, Protocol):
    """One way of computing networks."""


ACTIVATION_NAMES: Final = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""Activation functions, as `hidden_act` in config.json names them."""


def check_activation(name: str) -> str:
    """Refuse an activation function that is not supported.

    Raises:
        ModelError: Names those that are.
    """
    if name not in ACTIVATION_NAMES:
        raise ModelError(f"hidden_act {name!r} is not supported; supported are {', '.join(ACTIVATION_NAMES)}", param="hidden_act")
    return name


def stacked_matrix(ops: Ops, out_features: Mapping[str, int], in_features: int, *, bias: bool) -> Matrix:
    """Read projections of one input as a single matrix.

    Args:
        ops: Where the handle comes from.
        out_features: Names, without `.weight`, and sizes, in order.
        in_features: Size of the input.
        bias: Whether each has a bias.
    """
    weights: list[Part] = [(f"{name}.weight", (size, in_features)) for name, size in out_features.items()]
    biases: list[Part] = [(f"{name}.bias", (size,)) for name, size in out_features.items()] if bias else []
    return ops.matrix(weights, biases)


class Model(Protocol):
    """A network of one family: weight handles, and the operations over them."""

    def forward(self, ops: Ops) -> Value:
        """State one step: gives the sampled rows' logits, `[num_sampled, vocab_size]`, an encoder its pooled `[num_rows, size]`."""
        ...


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step on its way through the network. A step's tokens lie flat, decode rows (one token each) first.

    Attributes:
        token_ids: int64 `[num_tokens]`.
        positions: int64 `[num_tokens]`, index of each token in its sequence.
        slot_mapping: int64 `[num_tokens]`, where each token's keys and values go: `page * page_size + offset`.
        row_starts: int64 `[num_rows]`, tokens of each row that the pages hold already.
        row_counts: int64 `[num_rows]`, tokens that each row computes.
        page_tables: int64 `[num_rows, width]`; entries past a row's pages repeat a page of the same row, so that padding never
            reads what another sequence wrote. `width` is at least 4 more than one and a half times the longest row.
        num_decode_rows: How many rows, at the front, compute one token.
        sampled_tokens: int64 `[num_sampled]`, flat indices of the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    row_starts: torch.Tensor
    row_counts: torch.Tensor
    page_tables: torch.Tensor
    num_decode_rows: int
    sampled_tokens: torch.Tensor


Best = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]
"""For each row of logits: the first of the largest, and whether all are finite; where they are not, the first means nothing."""


class Network(Protocol):
    """A loaded model with its KV pages, ready to compute steps."""

    def forward(self, step: StepTensors) -> torch.Tensor:
        """Compute one step, writing its keys and values.

        Returns:
            float32 logits `[num_sampled, vocab_size]` of the step's sampled tokens; valid until the next step.
        """
        ...

    def best(self) -> Best | None:
        """The likeliest token of each row of the last `forward`, where the backend found it by the way."""
        ...

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy pages in all layers, int64 `[num_copies]` each; all are read before any is written."""
        ...

    def clear_pages(self, pages: torch.Tensor) -> None:
        """Zero some pages in all layers: int64 `[num_pages]`."""
        ...


class EncoderNetwork(Protocol):
    """A loaded encoder: no pages, and rows that are whole."""

    def encode(self, step: StepTensors) -> torch.Tensor:
        """Compute one step.

        Args:
            step: Of rows that start at 0. `slot_mapping`, `page_tables` and `sampled_tokens` are not looked at.

        Returns:
            float32 `[num_rows, size]`; valid until the next step.
        """
        ...
