"""Linear layers over quantised weights on a GPU: the file's own codes, multiplied by the kernels of `kernels/quantized_matmul`.

A layer is one or more segments of outputs, since matrices that are stacked may be stored in different ways; neighbours that are
stored alike are one segment, and one launch. Every product writes its outputs where they belong. Nothing waits for the device, and
what is allocated depends on the number of rows alone, so a layer can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Protocol, TypeVar

import torch
from torch.nn import functional

from kernels.quantized_matmul import launch
from kernels.quantized_matmul.reference import FP8_BLOCK, W4Weight, W8Weight


class Segment(Protocol):
    """Some outputs of a linear layer: a dataclass of tensors, and of values that joined segments have in common."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def num_outputs(self) -> int:
        """How many."""
        ...

    def multiply(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Compute `x @ weight.T + bias` into `out`, `[num_rows, num_outputs]`, whose rows may be strided."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PlainSegment:
    """Weights as numbers of the computation's type, `[num_outputs, num_inputs]`."""

    weight: torch.Tensor

    @property
    def num_outputs(self) -> int:
        """See `Segment.num_outputs`."""
        return self.weight.shape[0]

    def multiply(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        """See `Segment.multiply`."""
        out.copy_(functional.linear(x, self.weight, bias))


@dataclass(frozen=True, slots=True, eq=False)
class W4Segment:
    """4-bit weights in GPTQ's layout; inputs stay as they are. See `W4Weight`."""

    qweight: torch.Tensor
    scales: torch.Tensor
    group_size: int
    qzeros: torch.Tensor | None
    minimums: torch.Tensor | None

    @property
    def num_outputs(self) -> int:
        """See `Segment.num_outputs`."""
        return self.scales.shape[1]

    def multiply(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        """See `Segment.multiply`."""
        weight = W4Weight(self.qweight, self.scales, "gptq", self.group_size, self.qzeros, minimums=self.minimums)
        launch.matmul_w4a16(x, weight, bias=bias, out=out)


@dataclass(frozen=True, slots=True, eq=False)
class W8Segment:
    """Weights of a byte, integers or e4m3fn; inputs stay as they are. See `W8Weight`."""

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    zero: int
    minimums: torch.Tensor | None
    is_float8: bool

    @property
    def num_outputs(self) -> int:
        """See `Segment.num_outputs`."""
        return self.codes.shape[0]

    def multiply(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        """See `Segment.multiply`."""
        weight = W8Weight(self.codes, self.scales, self.group_size, self.zero, self.minimums, self.is_float8)
        launch.matmul_w8a16(x, weight, bias=bias, out=out)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Segment:
    """int8 weights for inputs that are quantised to int8, here: `[num_outputs, num_inputs]`, and float32 scales `[num_outputs]`."""

    weight: torch.Tensor
    row_scales: torch.Tensor

    @property
    def num_outputs(self) -> int:
        """See `Segment.num_outputs`."""
        return self.weight.shape[0]

    def multiply(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        """See `Segment.multiply`."""
        codes, scales = launch.quantize_int8(x)
        launch.matmul_int8(codes, scales, self.weight, self.row_scales, out=out, bias=bias)


@dataclass(frozen=True, slots=True, eq=False)
class Float8Segment:
    """float8_e4m3fn weights for inputs that are quantised to it, here; float32 scales of blocks of 128 outputs and 128 inputs."""

    weight: torch.Tensor
    block_scales: torch.Tensor

    @property
    def num_outputs(self) -> int:
        """See `Segment.num_outputs`."""
        return self.weight.shape[0]

    def multiply(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        """See `Segment.multiply`."""
        codes, scales = launch.quantize_fp8(x)
        launch.matmul_fp8(codes, scales, self.weight, self.block_scales, out=out, bias=bias)


class QuantizedLinear:
    """`y = x @ weight.T + bias` over segments of outputs.

    Args:
        segments: In the order of the outputs; see `join_alike`.
        bias: `[out_features]`, or None.
    """

    def __init__(self, segments: Sequence[Segment], bias: torch.Tensor | None = None) -> None:
        self.segments = segments
        self.out_features = sum(segment.num_outputs for segment in segments)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `x: [num_rows, in_features]`; gives `[num_rows, out_features]` of the same type."""
        out = x.new_empty((x.shape[0], self.out_features))
        first = 0
        for segment in self.segments:
            outputs = slice(first, first + segment.num_outputs)
            segment.multiply(x, out[:, outputs], None if self._bias is None else self._bias[outputs])
            first = outputs.stop
        return out


_OUTPUTS_LAST: Final = frozenset({"qweight", "qzeros", "minimums", "scales"})
"""Tensors of segments whose last dimension is outputs; of the others it is the first."""

AnySegment = TypeVar("AnySegment", bound=Segment)


def placed(segment: AnySegment, place: Callable[[torch.Tensor], torch.Tensor]) -> AnySegment:
    """Give a segment with all of its tensors where `place` puts them."""
    return replace(segment, **{name: place(tensor) for name, tensor in _tensors(segment).items()})


def join_alike(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Make one segment of neighbours that are stored alike."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if runs and _form(runs[-1][0]) == _form(segment) and _may_be_followed(runs[-1][-1]):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return tuple(_join(run) if len(run) > 1 else run[0] for run in runs)


def _join(run: Sequence[Segment]) -> Segment:
    parts = [_tensors(segment) for segment in run]
    joined = {name: torch.cat([part[name] for part in parts], dim=_outputs_of(name)) for name in parts[0]}
    return replace(run[0], **joined)


def _form(segment: Segment) -> tuple[Any, ...]:
    """What two segments must have in common to be one: all but the outputs."""
    form: list[Any] = [type(segment)]
    for name, value in _values(segment).items():
        if isinstance(value, torch.Tensor):
            form.append((name, value.dtype, value.shape[:-1] if name in _OUTPUTS_LAST else value.shape[1:]))
        else:
            form.append((name, value))
    return tuple(form)


def _may_be_followed(segment: Segment) -> bool:
    """Whether another one's outputs may follow: blocks must be whole."""
    return not isinstance(segment, Float8Segment) or segment.num_outputs % FP8_BLOCK == 0


def _outputs_of(name: str) -> int:
    return -1 if name in _OUTPUTS_LAST else 0


def _values(segment: Segment) -> dict[str, Any]:
    return {field.name: getattr(segment, field.name) for field in fields(segment)}


def _tensors(segment: Segment) -> dict[str, torch.Tensor]:
    return {name: value for name, value in _values(segment).items() if isinstance(value, torch.Tensor)}
