"""Small programs of native kernels: inputs go in as rows of an embedding table in float32, outputs come out as logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.cpu import library as native
from kernels.cpu.reference import Attention

FloatArray = npt.NDArray[np.float32]


def aligned(values: npt.NDArray[Any]) -> FloatArray:
    """A float32 copy as the kernels want their vectors: from a multiple of 64 bytes, with room for whole vectors."""
    memory = native.aligned_zeros(native.padded(values.size, 32), np.float32)
    out: FloatArray = memory[: values.size].reshape(values.shape)
    out[...] = values
    return out


class Program:
    """A program under construction, and then to be run; frees itself."""

    def __init__(
        self,
        library: Any,
        *,
        isa: int,
        num_threads: int = 1,
        max_tokens: int = 64,
        page_size: int = 16,
        page_format: int = native.PAGES_BF16,
    ) -> None:
        self.library = library
        self.pointer = library.hr_program_new(isa, max_tokens, max_tokens, num_threads, page_size, page_format)
        self._kept: list[Any] = []
        self._num_buffers = 0
        self._logits_width = 0

    def __del__(self) -> None:
        self.library.hr_program_free(self.pointer)

    def keep(self, thing: Any) -> Any:
        """Keep what the program points to."""
        self._kept.append(thing)
        return thing

    def vector(self, values: npt.NDArray[Any] | None) -> int | None:
        return None if values is None else int(self.keep(aligned(values)).ctypes.data)

    def value(self, width: int, kind: int = native.KIND_F32, *, domain: int = native.DOMAIN_TOKENS) -> int:
        self._num_buffers += 1
        return int(self.library.hr_value(self.pointer, kind, width, domain, self._num_buffers - 1))

    def feed(self, x: FloatArray) -> int:
        """Rows of `x`, by token id."""
        return self.embed(native.pack_dense(self.library, x))

    def embed(self, table: native.PackedMatrix, scale: float = 1.0) -> int:
        out = self.value(table.in_features)
        self.library.hr_embed(self.pointer, out, self.keep(table).segments[0], scale)
        return out

    def plain(self, op: int, source: int, target: int, number: float = 0.0) -> int:
        assert self.library.hr_plain(self.pointer, op, source, target, number)
        return target

    def gather(self, source: int, width: int) -> int:
        """The sampled rows of a value."""
        return self.plain(native.OP_GATHER, source, self.value(width, domain=native.DOMAIN_SAMPLED))

    def packed(self, source: int, width: int, kind: int) -> int:
        """The value in another form."""
        return source if kind == native.KIND_F32 else self.plain(native.OP_PACK, source, self.value(width, kind))

    def linear(self, source: int, matrix: native.PackedMatrix, target: int, bias: Any = None, scale: float | None = None) -> int:
        """`scale` adds to the target."""
        segments = (native.Segment * len(matrix.segments))(*self.keep(matrix).segments)
        bias_address = self.vector(bias)
        number, accumulate = (1.0, 0) if scale is None else (scale, 1)
        self.library.hr_linear(self.pointer, source, target, segments, len(segments), bias_address, number, accumulate)
        return target

    def product(self, x: FloatArray, matrix: native.PackedMatrix, bias: Any = None) -> int:
        source = self.packed(self.feed(x), x.shape[1], input_kind(matrix))
        return self.linear(source, matrix, self.value(matrix.out_features), bias)

    def unpacked(self, source: int, width: int) -> int:
        """What an int8 value holds: its product with the identity, which is exact."""
        codes = np.full((width, width), 128, np.uint8)
        np.fill_diagonal(codes, 129)
        scales = np.ones((width, width // 32), np.float32)
        identity = native.pack_codes(self.library, codes, bits=8, scales=scales, zero=128, minimums=None)
        return self.linear(source, identity, self.value(width))

    def attend(self, qkv: int, layer: Attention, *, only_sampled: bool = False) -> int:
        given = native.AttentionLayer(
            layer=0,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            window=layer.window,
            scale=layer.scale,
            soft_cap=layer.soft_cap,
            norm_eps=layer.norm_eps,
            norm_spans_heads=int(layer.q_norm is not None and layer.q_norm.shape[0] != layer.head_dim),
            only_sampled=int(only_sampled),
        )
        if layer.cos is not None:
            given.num_pairs = layer.cos.shape[1]
        for name in ("cos", "sin", "q_norm", "k_norm", "sinks"):
            if getattr(layer, name) is not None:
                setattr(given, name, self.vector(getattr(layer, name)))
        width = layer.num_heads * layer.head_dim
        queries, out = self.value(width, native.KIND_BF16), self.value(width)
        self.library.hr_attend(self.pointer, qkv, queries, out, given)
        return out

    def finish(self, output: int, width: int) -> Program:
        assert self.library.hr_finish(self.pointer, output)
        self._logits_width = width
        return self

    def set_pages(self, pages: npt.NDArray[Any]) -> None:
        """`[num_pages, items]`, of the type of the program's format."""
        self.library.hr_set_pages(self.pointer, 0, self.keep(pages).ctypes.data, pages.shape[1])

    def run(self, token_ids: npt.ArrayLike, rows: Rows | None = None, *, sampled: npt.ArrayLike = ()) -> FloatArray:
        """Outputs `[num_tokens, width]`, or of `sampled` rows; memory that no kernel writes shows as NaN."""
        ids = np.ascontiguousarray(token_ids, dtype=np.int64)
        sampled_ids = np.ascontiguousarray(sampled, dtype=np.int64)
        num_outputs = len(sampled_ids) or len(ids)
        rows = rows or Rows()
        arrays = {name: np.ascontiguousarray(getattr(rows, name), dtype=np.int64) for name in rows.__slots__}
        stride = native.padded(self._logits_width, 32) + 32
        logits = native.aligned_zeros(num_outputs * stride, np.float32).reshape(num_outputs, stride)
        logits[...] = np.nan
        best = np.full(num_outputs, -1, np.int64)
        is_finite = np.full(num_outputs, 2, np.uint8)
        step = native.Step(
            num_tokens=len(ids),
            num_rows=len(arrays["row_starts"]),
            table_stride=arrays["page_tables"].shape[1],
            token_ids=ids.ctypes.data,
            num_sampled=len(sampled_ids),
            sampled_tokens=sampled_ids.ctypes.data,
            logits=logits.ctypes.data,
            logits_stride=logits.shape[1],
            best=best.ctypes.data,
            is_finite=is_finite.ctypes.data,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        assert self.library.hr_run(self.pointer, step)
        outputs = logits[:, : self._logits_width]
        # Every run finds the likeliest tokens by the way.
        np.testing.assert_array_equal(is_finite, np.isfinite(outputs).all(axis=1))
        np.testing.assert_array_equal(best[is_finite == 1], outputs[is_finite == 1].argmax(axis=1))
        return outputs


@dataclass(slots=True)
class Rows:
    """The sequences of a step; see `StepTensors`."""

    positions: list[int] = field(default_factory=list)
    slot_mapping: list[int] = field(default_factory=list)
    row_starts: list[int] = field(default_factory=list)
    row_counts: list[int] = field(default_factory=list)
    page_tables: Any = field(default_factory=lambda: np.zeros((0, 1)))


def input_kind(matrix: native.PackedMatrix) -> int:
    """The form in which a product with this matrix wants its input."""
    kinds = {native.FORMAT_F32: native.KIND_F32, native.FORMAT_BF16: native.KIND_BF16}
    return kinds.get(matrix.segments[0].format, native.KIND_Q8)
