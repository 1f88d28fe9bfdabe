"""The operations of a network on a GPU: products of plain matrices by torch, all else that a decoder is made of by Triton kernels.

A residual's sum is not computed where it is stated: the norm that mostly follows adds by the way (`Sum`). Norms of queries and of
keys do not depend on each other and lie side by side in a captured graph. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Final, Literal

import torch

from headrace.errors import ModelError
from headrace.models.pooling_config import Pooling
from kernels.act_and_mul.launch import act_and_mul
from kernels.architecture import architecture_of
from kernels.fused_moe.launch import fused_moe, route
from kernels.fused_moe.reference import Experts as ExpertWeights
from kernels.quantized_matmul.launch import fp8_tiles_of
from kernels.rms_norm.launch import add_rms_norm, rms_norm
from kernels.rotary.launch import rotary
from services.worker.attention.triton_paged import TritonAttention
from services.worker.device import Device
from services.worker.layers.linear import Linear
from services.worker.layers.ops import AttentionSpec, ClampedSwiglu, MixtureSpec, Part
from services.worker.layers.rotary import RotaryTables
from services.worker.layers.torch_ops import TorchOps
from services.worker.layers.triton_linear import PlainSegment, QuantizedLinear, Segment, join_alike, placed
from services.worker.layers.triton_packing import take_segment
from services.worker.weights import WeightLoader

_ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_EXPERT_ACTIVATIONS: Final[dict[str, Literal["silu", "gelu_tanh"]]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Sum:
    """A residual's sum: `total`, to which `addend` is still to be added unless it is None."""

    __slots__ = ("addend", "total")

    def __init__(self, total: torch.Tensor, addend: torch.Tensor) -> None:
        self.total = total
        self.addend: torch.Tensor | None = addend


Value = torch.Tensor | Sum


class StackedExperts:
    """One linear layer for each expert.

    Args:
        weight: `[num_experts, out_features, in_features]`.
        bias: `[num_experts, out_features]`, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


class TritonOps(TorchOps):
    """See `Ops`.

    Args:
        weights: Where weights come from.
        device: Where they go, and what computes.
    """

    def __init__(self, weights: WeightLoader, device: Device) -> None:
        super().__init__(weights, TritonAttention())
        self._device = device
        self._multiplies_float8 = fp8_tiles_of(architecture_of(device.torch_device)).is_native
        self._mixtures: dict[int, ExpertWeights] = {}
        # Appended to from several threads at load.
        self._sizes_bytes: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Memory of the device that all weights given so far take."""
        return sum(self._sizes_bytes)

    def matrix(self, weights: Sequence[Part], biases: Sequence[Part] = ()) -> Linear | QuantizedLinear:  # type: ignore[override]
        """See `Ops.matrix`; what is stored as codes stays so where a kernel multiplies them."""
        bias = self._placed(self._weights.take_stacked(biases)) if biases else None
        if not any(self._weights.is_quantized(name) for name, _ in weights):
            return Linear(self._placed(self._weights.take_stacked(weights)), bias)
        segments = join_alike([self._segment(name, shape) for name, shape in weights])
        (segment,) = segments if len(segments) == 1 else (None,)
        return Linear(segment.weight, bias) if isinstance(segment, PlainSegment) else QuantizedLinear(segments, bias)

    def experts(self, weights: Sequence[Sequence[Part]], biases: Sequence[Sequence[Part]] = ()) -> StackedExperts:  # type: ignore[override]
        """See `Ops.experts`; an expert after the other goes to its place."""
        shape = (len(weights), sum(part_shape[0] for _, part_shape in weights[0]), weights[0][0][1][1])
        stacked = torch.empty(shape, dtype=self._weights.dtype, device=self._device.torch_device)
        self._sizes_bytes.append(stacked.nbytes)
        for name, _ in chain(*weights):
            if self._weights.is_quantized(name):
                self._weights.unpacked[name] = "experts are multiplied as plain numbers"
        for index, parts in enumerate(weights):
            stacked[index] = self._weights.take_stacked(parts)
        bias = torch.stack([self._placed(self._weights.take_stacked(parts)) for parts in biases]) if biases else None
        return StackedExperts(stacked, bias)

    def vector(self, name: str, size: int, *, shift: float = 0.0) -> torch.Tensor:
        """See `Ops.vector`."""
        return self._placed(super().vector(name, size, shift=shift))

    def table(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """See `Ops.table`."""
        return self._placed(super().table(name, shape))

    def rotary(self, tables: RotaryTables) -> RotaryTables:  # type: ignore[override]
        """See `Ops.rotary`."""
        cos, sin = (table.to(self._device.torch_device).contiguous() for table in (tables.cos, tables.sin))
        return RotaryTables(cos=cos, sin=sin)

    def rms_norm(self, x: Value, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        """See `Ops.rms_norm`."""
        if isinstance(x, Sum) and x.addend is not None:
            addend, x.addend = x.addend, None
            return add_rms_norm(addend, x.total, weight, eps=eps)
        return rms_norm(_settled(x), weight, eps=eps)

    def layer_norm(self, x: Value, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
        """See `Ops.layer_norm`."""
        return super().layer_norm(_settled(x), weight, bias, eps=eps)

    def linear(self, x: Value, matrix: Linear | QuantizedLinear) -> torch.Tensor:
        """See `Ops.linear`."""
        return matrix(_settled(x))

    def gated(self, gate_up: Value, activation: str) -> torch.Tensor:
        """See `Ops.gated`."""
        return act_and_mul(_settled(gate_up), _ACTIVATIONS[activation])

    def activated(self, x: Value, activation: str) -> torch.Tensor:
        """See `Ops.activated`."""
        return super().activated(_settled(x), activation)

    def mixture(self, x: Value, spec: MixtureSpec) -> torch.Tensor:
        """See `Ops.mixture`."""
        rows = _settled(x)
        layer = self._mixtures.get(id(spec))
        if layer is None:
            layer = self._mixtures[id(spec)] = _expert_weights(spec)
        weights, experts = route(spec.router(rows), spec.top_k, renormalize=spec.is_normalized)
        return fused_moe(rows, layer, weights, experts)

    def add(self, x: Value, y: Value, *, scale: float = 1.0) -> Value:  # type: ignore[override]
        """See `Ops.add`."""
        total, addend = _settled(x), _settled(y)
        return Sum(total, addend) if scale == 1.0 else torch.add(total, addend, alpha=scale)

    def attend(self, qkv: Value, spec: AttentionSpec) -> torch.Tensor:
        """See `Ops.attend`."""
        heads = _settled(qkv).unflatten(1, (-1, spec.head_dim))
        queries, keys = heads[:, : spec.num_heads], heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads]
        self._norm_heads(queries, keys, spec)
        assert self._step is not None
        if spec.rotary is not None:
            rotary(queries, keys, self._step.positions, spec.rotary.cos, spec.rotary.sin, is_interleaved=False)
        keys_values = heads[:, spec.num_heads :].unflatten(1, (2, spec.num_kv_heads))
        return self._attention.attend(self._prepared, self._kv_layers[spec.layer], queries, keys_values, spec)

    def sampled(self, x: Value) -> torch.Tensor:
        """See `Ops.sampled`."""
        return super().sampled(_settled(x))

    def pooled(self, x: Value, pooling: Pooling) -> torch.Tensor:
        """See `Ops.pooled`."""
        return super().pooled(_settled(x), pooling)

    def soft_cap(self, x: Value, cap: float) -> torch.Tensor:
        """See `Ops.soft_cap`."""
        return super().soft_cap(_settled(x), cap)

    def scaled(self, x: Value, scale: float) -> torch.Tensor:
        """See `Ops.scaled`."""
        return super().scaled(_settled(x), scale)

    def _segment(self, name: str, shape: tuple[int, ...]) -> Segment:
        segment = take_segment(self._weights, name, (shape[0], shape[1]), multiplies_float8=self._multiplies_float8)
        return placed(segment, self._placed)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        self._sizes_bytes.append(tensor.nbytes)
        return tensor.to(self._device.torch_device)

    def _norm_heads(self, queries: torch.Tensor, keys: torch.Tensor, spec: AttentionSpec) -> None:
        """Norm queries and keys in place."""
        if spec.q_norm is None or spec.k_norm is None:
            for heads, weight in ((queries, spec.q_norm), (keys, spec.k_norm)):
                if weight is not None:
                    _norm_in_place(heads, weight, spec.norm_eps)
            return
        self._device.together(
            partial(_norm_in_place, queries, spec.q_norm, spec.norm_eps),
            partial(_norm_in_place, keys, spec.k_norm, spec.norm_eps),
        )


def _settled(x: Value) -> torch.Tensor:
    """Give a value's numbers, adding what is still to be added."""
    if isinstance(x, torch.Tensor):
        return x
    if x.addend is not None:
        x.total.add_(x.addend)
        x.addend = None
    return x.total


def _norm_in_place(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    rows = heads if weight.shape[0] == heads.shape[-1] else heads.flatten(1)
    rms_norm(rows, weight, eps=eps, out=rows)


def _expert_weights(spec: MixtureSpec) -> ExpertWeights:
    gate_up, down, activation = spec.gate_up, spec.down, spec.activation
    if isinstance(activation, ClampedSwiglu):
        return ExpertWeights(
            gate_up.weight,
            down.weight,
            "swiglu_clamped",
            gate_up_bias=gate_up.bias,
            down_bias=down.bias,
            alpha=activation.alpha,
            limit=activation.limit,
        )
    if activation not in _EXPERT_ACTIVATIONS:
        raise ModelError(
            f"hidden_act {activation!r} of experts has no Triton kernel; there are {', '.join(_EXPERT_ACTIVATIONS)}: "
            "set worker.device to cpu",
            param="hidden_act",
        )
    return ExpertWeights(
        gate_up.weight, down.weight, _EXPERT_ACTIVATIONS[activation], gate_up_bias=gate_up.bias, down_bias=down.bias
    )
