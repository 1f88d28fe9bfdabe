"""The operations of a network in torch, computed at once: the plain path, on any device and for every family.

Where the CPU multiplies bfloat16 natively, bfloat16 matrices are packed once (`linear.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

from headrace.models.pooling_config import Pooling
from services.worker.attention.backend import AttentionBackend
from services.worker.attention.whole_rows import attend_whole_rows
from services.worker.kv_cache import KvCache
from services.worker.layers.linear import Linear
from services.worker.layers.ops import AttentionSpec, Best, Index, Layer, MixtureSpec, Model, Part, StepTensors
from services.worker.layers.rotary import Rotary, RotaryTables
from services.worker.layers.torch_mixture import clamped_swiglu, mix
from services.worker.weights import WeightLoader

_ACTIVATIONS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class TorchWeightOps:
    """See `WeightOps`.

    Args:
        weights: Where weights come from; their type is the type of the computation.
    """

    def __init__(self, weights: WeightLoader) -> None:
        self._weights = weights

    def map_layers(self, build: Callable[[int], Layer], num_layers: int) -> Iterator[Layer]:
        """See `Ops.map_layers`."""
        return self._weights.map(build, range(num_layers))

    def has(self, name: str) -> bool:
        """See `Ops.has`."""
        return self._weights.has(name)

    def skip(self, name: str) -> None:
        """See `Ops.skip`."""
        self._weights.skip(name)

    def skip_under(self, prefix: str) -> None:
        """See `Ops.skip_under`."""
        self._weights.skip_under(prefix)

    def matrix(self, weights: Sequence[Part], biases: Sequence[Part] = ()) -> Linear:
        """See `Ops.matrix`."""
        return Linear(self._weights.take_stacked(weights), self._weights.take_stacked(biases) if biases else None)

    def experts(self, weights: Sequence[Sequence[Part]], biases: Sequence[Sequence[Part]] = ()) -> tuple[Linear, ...]:
        """See `Ops.experts`."""
        return tuple(self.matrix(parts, biases[index] if biases else ()) for index, parts in enumerate(weights))

    def vector(self, name: str, size: int, *, shift: float = 0.0) -> torch.Tensor:
        """See `Ops.vector`."""
        vector = self._weights.take(name, (size,))
        # Scales near 1 keep two digits in bfloat16, their distances from 1 many more: the sum stays float32.
        return vector.float() + shift if shift else vector

    def table(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """See `Ops.table`."""
        return self._weights.take(name, shape)

    def tied(self, table: torch.Tensor) -> Linear:
        """See `Ops.tied`."""
        return Linear(table)

    def rotary(self, tables: RotaryTables) -> Rotary:
        """See `Ops.rotary`."""
        return Rotary(tables, self._weights.dtype)


class TorchOps(TorchWeightOps):
    """See `Ops`.

    Args:
        weights: See `TorchWeightOps`.
        attention: The attention backend.
    """

    def __init__(self, weights: WeightLoader, attention: AttentionBackend[Any]) -> None:
        super().__init__(weights)
        self._attention = attention
        self._step: StepTensors | None = None
        self._prepared: Any = None
        self._kv_layers: tuple[torch.Tensor, ...] = ()
        self._rotary_rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, step: StepTensors, kv_layers: tuple[torch.Tensor, ...]) -> None:
        """Set the step that the next operations are of."""
        self._step = step
        self._prepared = self._attention.prepare(step)
        self._kv_layers = kv_layers
        self._rotary_rows.clear()

    def embed(self, table: torch.Tensor, *, scale: float = 1.0, by: Index = "token") -> torch.Tensor:
        """See `Ops.embed`."""
        assert self._step is not None
        if by == "segment":
            return self.scaled(table[:1].expand(len(self._step.token_ids), -1), scale)
        indices = self._step.token_ids if by == "token" else self._step.positions
        return self.scaled(functional.embedding(indices, table), scale)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        """See `Ops.rms_norm`; summed in float32, the type is kept."""
        return _rms_norm(x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
        """See `Ops.layer_norm`; summed in float32, the type is kept."""
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def linear(self, x: torch.Tensor, matrix: Linear) -> torch.Tensor:
        """See `Ops.linear`."""
        return matrix(x)

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """See `Ops.gated`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return _ACTIVATIONS[activation](gate).mul_(up)

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """See `Ops.activated`."""
        return _ACTIVATIONS[activation](x)

    def mixture(self, x: torch.Tensor, spec: MixtureSpec) -> torch.Tensor:
        """See `Ops.mixture`."""
        activation = spec.activation
        gate = partial(self.gated, activation=activation) if isinstance(activation, str) else partial(clamped_swiglu, activation)
        return mix(x, spec, gate)

    def add(self, x: torch.Tensor, y: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """See `Ops.add`."""
        return torch.add(x, y, alpha=scale)

    def attend(self, qkv: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """See `Ops.attend`."""
        num_rotated = spec.num_heads + spec.num_kv_heads
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        queries, keys = heads[:, : spec.num_heads], heads[:, spec.num_heads : num_rotated]
        if spec.q_norm is not None:
            queries.copy_(_head_norm(queries, spec.q_norm, spec.norm_eps))
        if spec.k_norm is not None:
            keys.copy_(_head_norm(keys, spec.k_norm, spec.norm_eps))
        if spec.rotary is not None:
            spec.rotary.apply_(heads[:, :num_rotated], self._rows_of(spec.rotary))
        keys_values = heads[:, spec.num_heads :].unflatten(1, (2, spec.num_kv_heads))
        if not spec.is_causal:
            assert self._step is not None
            return attend_whole_rows(self._step, queries, keys_values, spec)
        return self._attention.attend(self._prepared, self._kv_layers[spec.layer], queries, keys_values, spec)

    def sampled(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ops.sampled`."""
        assert self._step is not None
        return x.index_select(0, self._step.sampled_tokens)

    def pooled(self, x: torch.Tensor, pooling: Pooling) -> torch.Tensor:
        """See `Ops.pooled`; in float32, as it is the last step of an encoder."""
        assert self._step is not None
        counts = self._step.row_counts
        ends = counts.cumsum(0)
        if pooling == "mean":
            rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
            sums = torch.zeros((len(counts), x.shape[1]), dtype=torch.float32).index_add_(0, rows, x.float())
            return sums / counts.unsqueeze(1)
        return x.index_select(0, ends - 1 if pooling == "last" else ends - counts).float()

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """See `Ops.soft_cap`; in float32, as it is the last step of logits."""
        return torch.tanh(x.float() / cap) * cap

    def scaled(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Ops.scaled`."""
        return x if scale == 1.0 else x * scale

    def _rows_of(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Table rows of the step's tokens, picked once a step."""
        assert self._step is not None
        rows = self._rotary_rows.get(id(rotary))
        if rows is None:
            rows = self._rotary_rows[id(rotary)] = rotary.rows(self._step.positions)
        return rows


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.dtype is x.dtype:
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return functional.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps).to(x.dtype)


def _head_norm(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.shape[0] == heads.shape[-1]:
        return _rms_norm(heads, weight, eps)
    return _rms_norm(heads.flatten(1), weight, eps).view(heads.shape)


class TorchNetwork:
    """See `Network`."""

    def __init__(self, model: Model, ops: TorchOps, kv_cache: KvCache) -> None:
        self._model = model
        self._ops = ops
        self._kv_layers = kv_cache.layers

    def forward(self, step: StepTensors) -> torch.Tensor:
        """See `Network.forward`."""
        self._ops.begin(step, self._kv_layers)
        logits: torch.Tensor = self._model.forward(self._ops)
        return logits.float()

    def best(self) -> Best | None:
        """See `Network.best`."""
        return None

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """See `Network.copy_pages`."""
        for layer_pages in self._kv_layers:
            layer_pages[targets] = layer_pages[sources]

    def clear_pages(self, pages: torch.Tensor) -> None:
        """See `Network.clear_pages`."""
        for layer_pages in self._kv_layers:
            layer_pages[pages] = 0


class TorchEncoder:
    """See `EncoderNetwork`.

    Args:
        model: The encoder.
        ops: What it was built with.
        is_normalized: Whether vectors are brought to length 1.
    """

    def __init__(self, model: Model, ops: TorchOps, *, is_normalized: bool) -> None:
        self._model = model
        self._ops = ops
        self._is_normalized = is_normalized

    def encode(self, step: StepTensors) -> torch.Tensor:
        """See `EncoderNetwork.encode`."""
        self._ops.begin(step, ())
        vectors: torch.Tensor = self._model.forward(self._ops).float()
        return functional.normalize(vectors, dim=-1) if self._is_normalized else vectors
