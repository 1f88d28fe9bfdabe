"""The operations of a network as a program of native CPU kernels (`kernels/cpu`).

`forward` of a model runs once, at load, over nodes that stand for values. Lowering then decides what the kernels are given: in
which form each value is wanted by who reads it (numbers, or packed for a product), what a product does by the way, and which
values share memory. A step is then one call that lets go of the interpreter, allocates nothing, and computes every row by the same
operations in the same order, whatever else is in the batch.

What the kernels cannot do raises `UnsupportedError`, and the worker takes the torch path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from headrace.errors import ConfigError
from headrace.models.pooling_config import Pooling
from kernels.cpu import library as native
from services.worker import machine
from services.worker.layers.native_graph import Node, sample_early
from services.worker.layers.native_packing import UnsupportedError, pack_matrix
from services.worker.layers.ops import AttentionSpec, Best, Index, Layer, MixtureSpec, Model, Part, StepTensors
from services.worker.layers.rotary import RotaryTables
from services.worker.step_parts import PART_TOKENS_MIN, parts_of
from services.worker.weights import WeightLoader

HEAD_DIM_MAX: Final = 256
CHUNK_TOKENS: Final = 128
_LANES: Final = 16
_PAGE_FORMATS: Final[dict[torch.dtype | None, tuple[int, type[np.uint16 | np.uint8]]]] = {
    None: (native.PAGES_BF16, np.uint16),
    torch.float8_e4m3fn: (native.PAGES_E4M3, np.uint8),
}
"""The kernels' number of a format of pages and the type of its codes, by 8-bit type."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class NativeMatrix:
    """Packed weights and the bias, `[out_features]` or None."""

    packed: native.PackedMatrix
    bias: FloatArray | None


def check_page_size(page_size: int) -> None:
    """Refuse pages that the kernels do not have; asked before weights are read.

    Raises:
        UnsupportedError: Names the sizes that there are.
    """
    if page_size % _LANES or CHUNK_TOKENS % page_size:
        raise UnsupportedError(f"page_size {page_size} is not 16, 32, 64 or 128")


class NativeOps:
    """See `Ops`.

    Args:
        library: From `native.load_library`.
        weights: Where weights come from. Quantised ones are kept as they are in the file; others are packed in the loader's type.
    """

    def __init__(self, library: Any, weights: WeightLoader) -> None:
        self._library = library
        self._weights = weights
        # Appended to from several threads at load.
        self._sizes_bytes: list[int] = []
        self.nodes: list[Node] = []

    @property
    def num_bytes(self) -> int:
        """Memory of all weights given so far."""
        return sum(self._sizes_bytes)

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

    def matrix(self, weights: Sequence[Part], biases: Sequence[Part] = ()) -> NativeMatrix:
        """See `Ops.matrix`."""
        packed = native.stack([self._pack(name, shape) for name, shape in weights])
        bias = _floats(self._weights.take_stacked(biases)) if biases else None
        return NativeMatrix(packed, bias)

    def experts(self, weights: Sequence[Sequence[Part]], biases: Sequence[Sequence[Part]] = ()) -> NoReturn:
        """See `Ops.experts`."""
        raise UnsupportedError("mixtures of experts")

    def vector(self, name: str, size: int, *, shift: float = 0.0) -> FloatArray:
        """See `Ops.vector`."""
        vector = _floats(self._weights.take(name, (size,)))
        vector += np.float32(shift)
        return vector

    def table(self, name: str, shape: tuple[int, int]) -> NativeMatrix:
        """See `Ops.table`; a table is packed as a matrix is, whether it is tied to one or not."""
        return self.matrix([(name, shape)])

    def tied(self, table: NativeMatrix) -> NativeMatrix:
        """See `Ops.tied`."""
        return table

    def rotary(self, tables: RotaryTables) -> tuple[FloatArray, FloatArray]:
        """See `Ops.rotary`."""
        return _floats(tables.cos), _floats(tables.sin)

    def embed(self, table: NativeMatrix, *, scale: float = 1.0, by: Index = "token") -> Node:
        """See `Ops.embed`."""
        if by != "token":
            raise UnsupportedError(f"embedding by {by}")
        return self._node("embed", (), table.packed.in_features, False, table, scale)

    def rms_norm(self, x: Node, weight: FloatArray, *, eps: float) -> Node:
        """See `Ops.rms_norm`."""
        return self._node("norm", (x,), _whole(x.width, "hidden_size"), x.is_sampled, weight, None, eps, False)

    def layer_norm(self, x: Node, weight: FloatArray, bias: FloatArray, *, eps: float) -> Node:
        """See `Ops.layer_norm`."""
        return self._node("norm", (x,), _whole(x.width, "hidden_size"), x.is_sampled, weight, bias, eps, True)

    def linear(self, x: Node, matrix: NativeMatrix) -> Node:
        """See `Ops.linear`."""
        assert x.width == matrix.packed.in_features
        return self._node("linear", (x,), matrix.packed.out_features, x.is_sampled, matrix)

    def gated(self, gate_up: Node, activation: str) -> Node:
        """See `Ops.gated`."""
        width = _whole(gate_up.width // 2, "intermediate_size")
        return self._node("gated", (gate_up,), width, gate_up.is_sampled, native.ACTIVATIONS[activation])

    def activated(self, x: Node, activation: str) -> NoReturn:
        """See `Ops.activated`."""
        raise UnsupportedError("feed-forward blocks without a gate")

    def mixture(self, x: Node, spec: MixtureSpec) -> NoReturn:
        """See `Ops.mixture`."""
        raise UnsupportedError("mixtures of experts")

    def pooled(self, x: Node, pooling: Pooling) -> NoReturn:
        """See `Ops.pooled`."""
        raise UnsupportedError("pooled rows")

    def add(self, x: Node, y: Node, *, scale: float = 1.0) -> Node:
        """See `Ops.add`."""
        return self._node("add", (x, y), _whole(x.width, "hidden_size"), x.is_sampled, scale)

    def attend(self, qkv: Node, spec: AttentionSpec) -> Node:
        """See `Ops.attend`."""
        if not spec.is_causal:
            raise UnsupportedError("attention in both directions")
        if spec.head_dim % _LANES or spec.head_dim > HEAD_DIM_MAX:
            raise UnsupportedError(f"head_dim {spec.head_dim} is not a multiple of {_LANES} up to {HEAD_DIM_MAX}")
        return self._node("attend", (qkv,), spec.num_heads * spec.head_dim, False, spec)

    def sampled(self, x: Node) -> Node:
        """See `Ops.sampled`."""
        return self._node("sampled", (x,), x.width, True)

    def soft_cap(self, x: Node, cap: float) -> Node:
        """See `Ops.soft_cap`."""
        return self._node("soft_cap", (x,), x.width, x.is_sampled, cap)

    def scaled(self, x: Node, scale: float) -> Node:
        """See `Ops.scaled`."""
        return x if scale == 1.0 else self._node("scaled", (x,), x.width, x.is_sampled, scale)

    def _node(self, op: str, inputs: tuple[Node, ...], width: int, is_sampled: bool, *what: Any) -> Node:
        node = Node(op, inputs, width, is_sampled, what)
        for value in inputs:
            value.uses.append(node)
        self.nodes.append(node)
        return node

    def _pack(self, name: str, shape: tuple[int, ...]) -> native.PackedMatrix:
        packed = pack_matrix(self._library, self._weights, name, (shape[0], shape[1]))
        self._sizes_bytes.append(packed.num_bytes)
        return packed


class NativeNetwork:
    """See `Network`: a program and the KV pages that it reads and writes.

    Pages are bfloat16, or float8 codes that are read as bfloat16. A page of a layer holds, for each key-value head, keys
    `[head_dim / 2, page_size, 2]` and values `[page_size / 2, head_dim, 2]`: pairs lie side by side as the products take them.

    Args:
        library: From `native.load_library`.
        model: The network; its `forward` is run once.
        ops: Where the model's weights came from.
        page_size: Tokens a page.
        kv_format: 8-bit type of the pages, `torch.float8_e4m3fn`; None for bfloat16.
        max_tokens: Most tokens of a step.
        num_threads: Threads that compute, the calling one included.
        isa: Number of the instruction set; None for the best that this CPU has.

    Raises:
        UnsupportedError: The kernels cannot compute this model with these pages.
    """

    def __init__(
        self,
        library: Any,
        model: Model,
        ops: NativeOps,
        *,
        page_size: int,
        kv_format: torch.dtype | None = None,
        max_tokens: int,
        num_threads: int,
        isa: int | None = None,
    ) -> None:
        check_page_size(page_size)
        self._library = library
        self._ops = ops
        self.isa = library.hr_best_isa() if isa is None else isa
        output = model.forward(ops)
        self._width = output.width
        page_format, self._page_dtype = _PAGE_FORMATS[kv_format]
        self._program = library.hr_program_new(self.isa, max_tokens, max_tokens, num_threads, page_size, page_format)
        self._num_kv_layers = _Lowering(library, self._program, sample_early(ops.nodes)).lower(output)
        self._pages: list[npt.NDArray[np.uint16 | np.uint8]] = []
        self._logits = torch.empty((0, output.width))
        self._best, self._is_finite = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
        self._step = native.Step()

    def __del__(self) -> None:
        if hasattr(self, "_program"):
            self._library.hr_program_free(self._program)

    def make_pages(self, num_pages: int, page_items: int) -> None:
        """Give the program its pages, zeroed. Their memory is taken here: the system gives it page by page as it is first written,
        which would cost the first prompts a tenth of their time.

        Args:
            num_pages: Pages of each layer.
            page_items: Numbers a page: `2 * num_kv_heads * head_dim * page_size`.
        """
        for layer in range(self._num_kv_layers):
            pages = native.aligned_zeros(num_pages * page_items, self._page_dtype)
            pages.fill(0)
            self._pages.append(pages.reshape(num_pages, page_items))
            self._library.hr_set_pages(self._program, layer, pages.ctypes.data, page_items)

    def forward(self, step: StepTensors) -> torch.Tensor:
        """See `Network.forward`. A step that finds no memory is computed in halves."""
        num_sampled = step.sampled_tokens.shape[0]
        if self._logits.shape[0] < num_sampled:
            # Rows a multiple of a page apart would meet in the same places of a cache.
            self._logits = torch.empty((num_sampled, native.padded(self._width, 32) + 32))
            self._best = np.zeros(num_sampled, dtype=np.int64)
            self._is_finite = np.zeros(num_sampled, dtype=np.bool_)
        page_tables = step.page_tables.contiguous()
        native_step = self._step
        native_step.num_tokens = step.token_ids.shape[0]
        native_step.num_rows, native_step.table_stride = page_tables.shape
        native_step.num_sampled = num_sampled
        native_step.token_ids = step.token_ids.data_ptr()
        native_step.positions = step.positions.data_ptr()
        native_step.slot_mapping = step.slot_mapping.data_ptr()
        native_step.row_starts = step.row_starts.data_ptr()
        native_step.row_counts = step.row_counts.data_ptr()
        native_step.page_tables = page_tables.data_ptr()
        native_step.sampled_tokens = step.sampled_tokens.data_ptr()
        native_step.logits, native_step.logits_stride = self._logits.data_ptr(), self._logits.shape[1]
        native_step.best, native_step.is_finite = self._best.ctypes.data, self._is_finite.ctypes.data
        if not self._library.hr_run(self._program, native_step):
            self._run_halves(step)
        return self._logits[:num_sampled, : self._width]

    def _run_halves(self, step: StepTensors) -> None:
        """Compute a step that found no memory in two parts, each of which may be cut again; what they found is put together.

        Raises:
            ConfigError: It has too few tokens for that to help.
        """
        num_tokens, num_sampled = step.token_ids.shape[0], step.sampled_tokens.shape[0]
        if num_tokens <= PART_TOKENS_MIN:
            raise ConfigError(
                f"the native kernels find no memory for a step of {num_tokens} tokens, {machine.available_memory_bytes()} bytes "
                "are free: another process takes it, or worker.kv_cache_bytes is too large",
                param="worker.kv_cache_bytes",
            )
        logits = torch.empty((num_sampled, self._width))
        best, is_finite = np.empty(num_sampled, dtype=np.int64), np.empty(num_sampled, dtype=np.bool_)
        for part, sampled in parts_of(step, -(-num_tokens // 2)):
            # Each part writes over what the one before it found.
            logits[sampled] = self.forward(part)
            places, count = sampled.numpy(), len(sampled)
            best[places], is_finite[places] = self._best[:count], self._is_finite[:count]
        self._logits[:num_sampled, : self._width] = logits
        self._best[:num_sampled], self._is_finite[:num_sampled] = best, is_finite
        self._step.num_sampled = num_sampled

    def best(self) -> Best | None:
        """See `Network.best`."""
        num_sampled = self._step.num_sampled
        return self._best[:num_sampled].copy(), self._is_finite[:num_sampled].copy()

    def start_profile(self) -> None:
        """Time every operation from now on."""
        self._library.hr_start_profile(self._program)

    def profile(self) -> list[int]:
        """Nanoseconds since `start_profile`, by kind of operation in the order of `native.OP_KINDS`."""
        nanoseconds = np.zeros(len(native.OP_KINDS), dtype=np.int64)
        self._library.hr_profile(self._program, nanoseconds.ctypes.data)
        return list(map(int, nanoseconds))

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """See `Network.copy_pages`."""
        for pages in self._pages:
            pages[targets.numpy()] = pages[sources.numpy()]

    def clear_pages(self, pages: torch.Tensor) -> None:
        """See `Network.clear_pages`."""
        for layer_pages in self._pages:
            layer_pages[pages.numpy()] = 0


@dataclass(frozen=True, slots=True)
class _Place:
    """A value of the program."""

    value: int
    kind: int
    width: int
    is_sampled: bool
    buffer: int


class _Places:
    """Where the values of a program are: in which forms, in which buffers, and until when.

    Args:
        library: From `native.load_library`.
        program: The program.
        nodes: All nodes, in order.
        fused: Nodes that are computed by the way, node → the one that does it.
    """

    def __init__(self, library: Any, program: int, nodes: list[Node], fused: dict[int, Node]) -> None:
        self._library = library
        self._program = program
        self._order = {id(node): index for index, node in enumerate(nodes)}
        self._fused = fused
        # A value's places, by its form there.
        self._places: dict[int, dict[int, _Place]] = {}
        self._num_buffers = 0
        self._free_buffers: dict[tuple[int, int, bool], list[int]] = {}

    def read(self, node: Node, kind: int) -> int:
        """The value in one form, packed here if it is not there yet."""
        places = self._places[id(node)]
        if kind not in places:
            places[kind] = self._take(node, kind)
            self._library.hr_plain(self._program, native.OP_PACK, places[native.KIND_F32].value, places[kind].value, 0.0)
        return places[kind].value

    def write(self, node: Node, kind: int = native.KIND_F32) -> int:
        """A place for a new value."""
        place = self._take(node, kind)
        self._places[id(node)] = {kind: place}
        return place.value

    def write_as_wanted(self, node: Node) -> int:
        """A place for a value that can be made in any form: the one in which it is read, numbers where there are several."""
        kinds = _kinds_wanted(node)
        return self.write(node, kinds.pop() if len(kinds) == 1 else native.KIND_F32)

    def write_over(self, node: Node, x: Node) -> int:
        """Let a node write over the value it reads."""
        if any(self._when(use) > self._order[id(node)] for use in x.uses):
            raise UnsupportedError(f"a value is read after {node.op} has written over it")
        self.read(x, native.KIND_F32)
        # Packed copies are of the old numbers.
        self._places[id(node)] = {native.KIND_F32: self._places[id(x)].pop(native.KIND_F32)}
        return self._places[id(node)][native.KIND_F32].value

    def scratch(self, node: Node, kind: int) -> int:
        """A place that is free again with the next value."""
        place = self._take(node, kind)
        self._free(place)
        return place.value

    def release_after(self, node: Node) -> None:
        """Give back the memory of values that nothing reads any more."""
        now = self._order[id(node)]
        for value in node.inputs:
            source = value.inputs[0] if id(value) in self._fused else value
            places = self._places.get(id(source))
            if places is None or any(self._when(use) > now for use in source.uses):
                continue
            for place in self._places.pop(id(source)).values():
                self._free(place)

    def _when(self, node: Node) -> int:
        """When a node is computed."""
        return self._order[id(self._fused.get(id(node), node))]

    def _take(self, node: Node, kind: int) -> _Place:
        # Buffers serve values of one width only, so that what pads a row is zero for ever.
        free = self._free_buffers.get((kind, node.width, node.is_sampled))
        if free:
            buffer = free.pop()
        else:
            buffer = self._num_buffers
            self._num_buffers += 1
        domain = native.DOMAIN_SAMPLED if node.is_sampled else native.DOMAIN_TOKENS
        value = self._library.hr_value(self._program, kind, node.width, domain, buffer)
        return _Place(value, kind, node.width, node.is_sampled, buffer)

    def _free(self, place: _Place) -> None:
        self._free_buffers.setdefault((place.kind, place.width, place.is_sampled), []).append(place.buffer)


class _Lowering:
    """Turns nodes into a program; every `_<op>` method emits one operation."""

    def __init__(self, library: Any, program: int, nodes: list[Node]) -> None:
        self._library = library
        self._program = program
        self._nodes = nodes
        self._fused = _find_fused(library, nodes)
        self._places = _Places(library, program, nodes, self._fused)
        self._kv_layers: set[int] = set()

    def lower(self, output: Node) -> int:
        """Emit everything; gives the number of layers with KV pages."""
        if output.uses:
            raise UnsupportedError("the logits are read again")
        for node in self._nodes:
            if id(node) not in self._fused:
                getattr(self, f"_{node.op}")(node)
                self._places.release_after(node)
        if not self._library.hr_finish(self._program, self._places.read(output, native.KIND_F32)):
            raise MemoryError("the native kernels have no memory for their values")
        if self._kv_layers != set(range(len(self._kv_layers))):
            raise UnsupportedError(f"attention layers {sorted(self._kv_layers)} are not numbered from 0")
        return len(self._kv_layers)

    def _embed(self, node: Node) -> None:
        table, scale = node.what
        if len(table.packed.segments) != 1:
            raise UnsupportedError("an embedding table in several parts")
        self._library.hr_embed(self._program, self._places.write(node), table.packed.segments[0], scale)

    def _norm(self, node: Node) -> None:
        weight, bias, eps, is_layer_norm = node.what
        source = self._places.read(node.inputs[0], native.KIND_F32)
        bias_address = None if bias is None else bias.ctypes.data
        target = self._places.write_as_wanted(node)
        self._library.hr_norm(self._program, source, target, weight.ctypes.data, bias_address, eps, int(is_layer_norm))

    def _linear(self, node: Node) -> None:
        self._product(node, self._places.write(node), scale=1.0, accumulate=False)

    def _product(self, node: Node, target: int, *, scale: float, accumulate: bool) -> None:
        matrix: NativeMatrix = node.what[0]
        bias = None if matrix.bias is None else matrix.bias.ctypes.data
        for kind in sorted(_input_kinds(matrix)):
            segments = [segment for segment in matrix.packed.segments if _input_kind(segment) == kind]
            array = (native.Segment * len(segments))(*segments)
            source = self._places.read(node.inputs[0], kind)
            self._library.hr_linear(self._program, source, target, array, len(segments), bias, scale, int(accumulate))

    def _gated(self, node: Node) -> None:
        gate_up = node.inputs[0]
        if id(gate_up) in self._fused:
            matrix: NativeMatrix = gate_up.what[0]
            halves = native.split_in_two(self._library, matrix.packed)
            assert halves is not None
            source = self._places.read(gate_up.inputs[0], _input_kind(halves[0]))
            bias = None if matrix.bias is None else matrix.bias.ctypes.data
            array = (native.Segment * 2)(*halves)
            self._library.hr_gated_linear(self._program, source, self._places.write_as_wanted(node), array, bias, node.what[0])
            return
        source = self._places.read(node.inputs[0], native.KIND_F32)
        self._library.hr_plain(self._program, native.OP_GATED, source, self._places.write_as_wanted(node), float(node.what[0]))

    def _add(self, node: Node) -> None:
        x, y = node.inputs
        scale = node.what[0]
        target = self._places.write_over(node, x)
        if id(y) in self._fused:
            self._product(y, target, scale=scale, accumulate=True)
        else:
            self._library.hr_plain(self._program, native.OP_ADD, self._places.read(y, native.KIND_F32), target, scale)

    def _attend(self, node: Node) -> None:
        spec: AttentionSpec = node.what[0]
        qkv = node.inputs[0]
        if qkv.uses != [node]:
            raise UnsupportedError("queries, keys and values are read twice")
        self._kv_layers.add(spec.layer)
        source = self._places.read(qkv, native.KIND_F32)
        target = self._places.write(node)
        queries = self._places.scratch(node, native.KIND_BF16)
        layer = _attention_layer(spec)
        layer.only_sampled = int(node.is_read_sampled)
        self._library.hr_attend(self._program, source, queries, target, layer)

    def _sampled(self, node: Node) -> None:
        source = self._places.read(node.inputs[0], native.KIND_F32)
        self._library.hr_plain(self._program, native.OP_GATHER, source, self._places.write(node), 0.0)

    def _soft_cap(self, node: Node) -> None:
        self._library.hr_plain(self._program, native.OP_SOFT_CAP, -1, self._places.write_over(node, node.inputs[0]), node.what[0])

    def _scaled(self, node: Node) -> None:
        self._library.hr_plain(self._program, native.OP_SCALE, -1, self._places.write_over(node, node.inputs[0]), node.what[0])


def _find_fused(library: Any, nodes: list[Node]) -> dict[int, Node]:
    """Products whose only reader is a sum or a gate, which the product then does by the way; gives node → reader."""
    fused: dict[int, Node] = {}
    for node in nodes:
        source = node.inputs[-1] if node.op in ("add", "gated") else None
        if source is None or source.op != "linear" or source.uses != [node] or source.inputs[0] is node.inputs[0]:
            continue
        is_one_kind = len(_input_kinds(source.what[0])) == 1 and len(_kinds_wanted(node)) == 1
        if node.op == "add" or (is_one_kind and native.split_in_two(library, source.what[0].packed)):
            fused[id(source)] = node
    return fused


def _kinds_wanted(node: Node) -> set[int]:
    """The forms in which a value is read."""
    kinds: set[int] = set()
    for use in node.uses:
        kinds |= _input_kinds(use.what[0]) if use.op == "linear" else {native.KIND_F32}
    return kinds or {native.KIND_F32}


def _input_kind(segment: native.Segment) -> int:
    if segment.format == native.FORMAT_F32:
        return native.KIND_F32
    return native.KIND_BF16 if segment.format == native.FORMAT_BF16 else native.KIND_Q8


def _input_kinds(matrix: NativeMatrix) -> set[int]:
    return {_input_kind(segment) for segment in matrix.packed.segments}


def _attention_layer(spec: AttentionSpec) -> native.AttentionLayer:
    layer = native.AttentionLayer(
        layer=spec.layer,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        window=spec.window or 0,
        scale=spec.scale,
        soft_cap=spec.soft_cap or 0.0,
        norm_eps=spec.norm_eps,
    )
    if spec.rotary is not None:
        cos, sin = spec.rotary
        layer.num_pairs, layer.cos, layer.sin = cos.shape[1], cos.ctypes.data, sin.ctypes.data
    for name in ("q_norm", "k_norm", "sinks"):
        vector = getattr(spec, name)
        if vector is not None:
            setattr(layer, name, vector.ctypes.data)
    layer.norm_spans_heads = int(spec.q_norm is not None and spec.q_norm.shape[0] != spec.head_dim)
    return layer


def _floats(tensor: torch.Tensor) -> FloatArray:
    """A float32 copy that starts at a multiple of 64 bytes, its length padded to whole vectors."""
    values = tensor.float().numpy()
    out = native.aligned_zeros(native.padded(values.size, 32), np.float32)[: values.size].reshape(values.shape)
    out[...] = values
    return out


def _whole(width: int, name: str) -> int:
    if width % _LANES:
        raise UnsupportedError(f"{name} {width} is not a multiple of {_LANES}")
    return width
