"""The operations of a network in torch, computed at once: the plain path, on any device and for every family.

Where the CPU multiplies bfloat16 natively, bfloat16 matrices are packed once (`linear.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

from services.worker.attention.backend import AttentionBackend
from services.worker.kv_cache import KvCache
from services.worker.layers.linear import Linear
from services.worker.layers.ops import AttentionSpec, Layer, Model, Part, StepTensors
from services.worker.layers.rotary import Rotary, RotaryTables
from services.worker.weights import WeightLoader

_ACTIVATIONS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class TorchOps:
    """See `Ops`.

    Args:
        weights: Where weights come from; their type is the type of the computation.
        attention: The attention backend.
    """

    def __init__(self, weights: WeightLoader, attention: AttentionBackend[Any]) -> None:
        self._weights = weights
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

    def map_layers(self, build: Callable[[int], Layer], num_layers: int) -> Iterator[Layer]:
        """See `Ops.map_layers`."""
        return self._weights.map(build, range(num_layers))

    def has(self, name: str) -> bool:
        """See `Ops.has`."""
        return self._weights.has(name)

    def skip(self, name: str) -> None:
        """See `Ops.skip`."""
        self._weights.skip(name)

    def matrix(self, weights: Sequence[Part], biases: Sequence[Part] = ()) -> Linear:
        """See `Ops.matrix`."""
        return Linear(self._weights.take_stacked(weights), self._weights.take_stacked(biases) if biases else None)

    def vector(self, name: str, size: int, *, shift: float = 0.0) -> torch.Tensor:
        """See `Ops.vector`."""
        vector = self._weights.take(name, (size,))
        return vector + shift if shift else vector

    def table(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """See `Ops.table`."""
        return self._weights.take(name, shape)

    def tied(self, table: torch.Tensor) -> Linear:
        """See `Ops.tied`."""
        return Linear(table)

    def rotary(self, tables: RotaryTables) -> Rotary:
        """See `Ops.rotary`."""
        return Rotary(tables, self._weights.dtype)

    def embed(self, table: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """See `Ops.embed`."""
        assert self._step is not None
        return self.scaled(functional.embedding(self._step.token_ids, table), scale)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        """See `Ops.rms_norm`; summed in float32, the type is kept."""
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def linear(self, x: torch.Tensor, matrix: Linear) -> torch.Tensor:
        """See `Ops.linear`."""
        return matrix(x)

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """See `Ops.gated`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return _ACTIVATIONS[activation](gate).mul_(up)

    def add(self, x: torch.Tensor, y: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """See `Ops.add`."""
        return torch.add(x, y, alpha=scale)

    def attend(self, qkv: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """See `Ops.attend`."""
        num_rotated = spec.num_heads + spec.num_kv_heads
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        queries, keys = heads[:, : spec.num_heads], heads[:, spec.num_heads : num_rotated]
        if spec.q_norm is not None:
            queries.copy_(self._head_norm(queries, spec.q_norm, spec.norm_eps))
        if spec.k_norm is not None:
            keys.copy_(self._head_norm(keys, spec.k_norm, spec.norm_eps))
        if spec.rotary is not None:
            spec.rotary.apply_(heads[:, :num_rotated], self._rows_of(spec.rotary))
        keys_values = heads[:, spec.num_heads :].unflatten(1, (2, spec.num_kv_heads))
        return self._attention.attend(self._prepared, self._kv_layers[spec.layer], queries, keys_values, spec)

    def sampled(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ops.sampled`."""
        assert self._step is not None
        return x.index_select(0, self._step.sampled_tokens)

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """See `Ops.soft_cap`; in float32, as it is the last step of logits."""
        return torch.tanh(x.float() / cap) * cap

    def scaled(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Ops.scaled`."""
        return x if scale == 1.0 else x * scale

    def _head_norm(self, heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if weight.shape[0] == heads.shape[-1]:
            return self.rms_norm(heads, weight, eps=eps)
        return self.rms_norm(heads.flatten(1), weight, eps=eps).view(heads.shape)

    def _rows_of(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Table rows of the step's tokens, picked once a step."""
        assert self._step is not None
        rows = self._rotary_rows.get(id(rotary))
        if rows is None:
            rows = self._rotary_rows[id(rotary)] = rotary.rows(self._step.positions)
        return rows


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

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """See `Network.copy_pages`."""
        for layer_pages in self._kv_layers:
            layer_pages[targets] = layer_pages[sources]

    def clear_pages(self, pages: torch.Tensor) -> None:
        """See `Network.clear_pages`."""
        for layer_pages in self._kv_layers:
            layer_pages[pages] = 0
