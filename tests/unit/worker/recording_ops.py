"""Operations that compute nothing: they note which tensors a family asks for, and follow the widths of its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from services.worker.layers.ops import AttentionSpec, MixtureSpec, Part
from services.worker.layers.rotary import RotaryTables

Shape = tuple[int, ...]


class RecordingOps:
    """See `Ops`; a value is its width, a handle the shape of its matrix."""

    def __init__(self, present: Sequence[str] = ()) -> None:
        self.shapes: dict[str, Shape] = {}
        self.rotaries: list[RotaryTables] = []
        self.attended: list[AttentionSpec] = []
        self._present = present

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _ask(self, name: str, shape: Shape) -> None:
        assert name not in self.shapes, name
        self.shapes[name] = shape

    def map_layers(self, build: Callable[[int], Any], num_layers: int) -> Iterator[Any]:
        return map(build, range(num_layers))

    def has(self, name: str) -> bool:
        return name in self._present

    def skip(self, name: str) -> None:
        pass

    def skip_under(self, prefix: str) -> None:
        pass

    def matrix(self, weights: Sequence[Part], biases: Sequence[Part] = ()) -> Shape:
        for name, shape in [*weights, *biases]:
            self._ask(name, shape)
        num_rows = sum(shape[0] for _, shape in weights)
        assert not biases or sum(shape[0] for _, shape in biases) == num_rows
        return num_rows, weights[0][1][1]

    def experts(self, weights: Sequence[Sequence[Part]], biases: Sequence[Sequence[Part]] = ()) -> list[Shape]:
        return [self.matrix(parts, biases[index] if biases else ()) for index, parts in enumerate(weights)]

    def vector(self, name: str, size: int, *, shift: float = 0.0) -> int:
        self._ask(name, (size,))
        return size

    def table(self, name: str, shape: tuple[int, int]) -> Shape:
        self._ask(name, shape)
        return shape

    def tied(self, table: Shape) -> Shape:
        return table

    def rotary(self, tables: RotaryTables) -> RotaryTables:
        self.rotaries.append(tables)
        return tables

    def embed(self, table: Shape, *, scale: float = 1.0, by: str = "token") -> int:
        return table[1]

    def rms_norm(self, x: int, weight: int, *, eps: float) -> int:
        assert x == weight
        return x

    def layer_norm(self, x: int, weight: int, bias: int, *, eps: float) -> int:
        assert x == weight == bias
        return x

    def linear(self, x: int, matrix: Shape) -> int:
        assert x == matrix[1]
        return matrix[0]

    def gated(self, gate_up: int, activation: str) -> int:
        return gate_up // 2

    def activated(self, x: int, activation: str) -> int:
        return x

    def mixture(self, x: int, spec: MixtureSpec) -> int:
        assert spec.router == (len(spec.down), x)
        assert {self.linear(self.linear(x, into) // 2, back) for into, back in zip(spec.gate_up, spec.down, strict=True)} == {x}
        return x

    def add(self, x: int, y: int, *, scale: float = 1.0) -> int:
        assert x == y
        return x

    def attend(self, qkv: int, spec: AttentionSpec) -> int:
        assert qkv == (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        assert spec.sinks in (None, spec.num_heads)
        self.attended.append(spec)
        return spec.num_heads * spec.head_dim

    def sampled(self, x: int) -> int:
        return x

    def pooled(self, x: int, pooling: str) -> int:
        return x

    def soft_cap(self, x: int, cap: float) -> int:
        return x

    def scaled(self, x: int, scale: float) -> int:
        return x
