"""The native library as Python sees it: its structures (`src/abi.h`), its functions with their types, and packing of weights.

Pointers are plain integers; whoever makes a program keeps what they point to alive. A call lets go of the interpreter.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

LIBRARY_FILE: Final = Path(__file__).resolve().parent / "libheadrace_cpu.so"
ABI_VERSION: Final = 6

KIND_F32, KIND_Q8, KIND_BF16 = 0, 1, 2
DOMAIN_TOKENS, DOMAIN_SAMPLED = 0, 1
PAGES_BF16, PAGES_E4M3 = 0, 1
FORMAT_F32, FORMAT_BF16, FORMAT_Q4, FORMAT_Q8 = 0, 1, 2, 3
OP_PACK, OP_GATED, OP_ACTIVATE, OP_ADD, OP_SCALE, OP_SOFT_CAP, OP_GATHER = range(7)

OP_KINDS: Final = (
    "embed",
    "norm",
    "pack",
    "linear",
    "gated_linear",
    "gated",
    "activate",
    "add",
    "scale",
    "soft_cap",
    "gather",
    "rotate_store",
    "attend",
    "merge",
    "best",
)
"""Kinds of operations, in the order in which a profile tells their times."""

ISA_NAMES: Final = ("generic", "avx2", "avx512", "avx512_bf16")
"""Instruction sets by their number in the library."""

ACTIVATIONS: Final = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
"""Numbers of the activation functions that are built in, by their name in config.json."""

PANEL_ROWS: Final = 32
"""Outputs that are packed together; packed matrices are padded to a multiple."""


class Segment(Structure):
    """A packed matrix `[n, k]`, or the part of one that is packed in one form."""

    _fields_ = [
        ("format", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("group", c_int32),
        ("half_scales", c_int32),
        ("has_minimums", c_int32),
        ("zero", c_int32),
        ("out_offset", c_int32),
        ("data", c_void_p),
    ]


class AttentionLayer(Structure):
    """One attention layer; pointers to float32, null where there is nothing."""

    _fields_ = [
        ("layer", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("num_pairs", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("norm_eps", c_float),
        ("norm_spans_heads", c_int32),
        ("only_sampled", c_int32),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("sinks", c_void_p),
    ]


class Step(Structure):
    """One step; int64 arrays, and float32 logits to be written."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("num_sampled", c_int64),
        ("table_stride", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("row_starts", c_void_p),
        ("row_counts", c_void_p),
        ("page_tables", c_void_p),
        ("sampled_tokens", c_void_p),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("best", c_void_p),
        ("is_finite", c_void_p),
    ]


class DrawRows(Structure):
    """Rows to draw tokens from, and which of them; arrays are by row but `indices` and `tokens`."""

    _fields_ = [
        ("num_drawn", c_int64),
        ("vocab_size", c_int64),
        ("stride", c_int64),
        ("logits", c_void_p),
        ("indices", c_void_p),
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("seeds", c_void_p),
        ("positions", c_void_p),
        ("tokens", c_void_p),
    ]


_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "hr_abi_version": (c_int32, ()),
    "hr_best_isa": (c_int32, ()),
    "hr_program_new": (c_void_p, (c_int32, c_int64, c_int64, c_int32, c_int32, c_int32)),
    "hr_program_free": (None, (c_void_p,)),
    "hr_program_threads": (c_int32, (c_void_p,)),
    "hr_value": (c_int32, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "hr_finish": (c_int32, (c_void_p, c_int32)),
    "hr_set_pages": (None, (c_void_p, c_int32, c_void_p, c_int64)),
    "hr_run": (c_int32, (c_void_p, POINTER(Step))),
    "hr_start_profile": (None, (c_void_p,)),
    "hr_profile": (c_int32, (c_void_p, c_void_p)),
    "hr_embed": (None, (c_void_p, c_int32, POINTER(Segment), c_float)),
    "hr_norm": (None, (c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_float, c_int32)),
    "hr_linear": (None, (c_void_p, c_int32, c_int32, POINTER(Segment), c_int32, c_void_p, c_float, c_int32)),
    "hr_gated_linear": (None, (c_void_p, c_int32, c_int32, POINTER(Segment), c_void_p, c_int32)),
    "hr_plain": (c_int32, (c_void_p, c_int32, c_int32, c_int32, c_float)),
    "hr_attend": (None, (c_void_p, c_int32, c_int32, c_int32, POINTER(AttentionLayer))),
    "hr_draw_scratch_bytes": (c_int64, (c_int64,)),
    "hr_draw": (None, (c_int32, POINTER(DrawRows), c_void_p)),
    "hr_likeliest_allowed": (c_int64, (c_void_p, c_void_p, c_int64)),
    "hr_unit_bytes": (c_int64, (POINTER(Segment),)),
    "hr_pack_dense": (None, (POINTER(Segment), c_void_p, c_int64)),
    "hr_pack_codes": (None, (POINTER(Segment), c_void_p, c_void_p, c_void_p, c_int64, c_int32)),
    "hr_pack_blocks": (None, (POINTER(Segment), c_void_p)),
}


class NativeLibraryError(Exception):
    """The library is not there, or cannot be used; the text says why."""


def load_library(path: Path = LIBRARY_FILE) -> Any:
    """Load the library and give it its types.

    Raises:
        NativeLibraryError: It was not built, does not load here, or is of another build.
    """
    if not path.is_file():
        raise NativeLibraryError("the native CPU library is not built: install a C++ compiler (g++) and install again")
    try:
        library = ctypes.CDLL(str(path))
        version = library.hr_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"the native CPU library does not load: {error}: install again") from error
    if version != ABI_VERSION:
        raise NativeLibraryError(f"the native CPU library has interface {version}, not {ABI_VERSION}: install again")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A matrix in the library's own layout. `arrays` is the memory that `segments` point into.

    Attributes:
        segments: Parts, in order of their outputs.
        out_features: Outputs of all parts together.
        in_features: Size of the input.
    """

    segments: tuple[Segment, ...]
    out_features: int
    in_features: int
    arrays: tuple[npt.NDArray[Any], ...]

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weights."""
        return sum(array.nbytes for array in self.arrays)


def aligned_zeros(num_items: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A flat array of zeros that starts at a multiple of 64 bytes; its memory is given when it is written."""
    size = num_items * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype)


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def pack_dense(library: Any, values: npt.NDArray[Any]) -> PackedMatrix:
    """Pack `[n, k]` float32, or bfloat16 as raw 16-bit integers."""
    values = np.ascontiguousarray(values)
    n, k = values.shape
    packed_format = FORMAT_F32 if values.dtype == np.float32 else FORMAT_BF16
    matrix = _matrix(library, Segment(format=packed_format, n=n, k=padded(k, 32), group=32), k)
    library.hr_pack_dense(matrix.segments[0], values.ctypes.data, k)
    return matrix


def pack_blocks(library: Any, dtype_name: str, rows: npt.NDArray[np.uint8], in_features: int) -> PackedMatrix:
    """Pack GGUF blocks `[n, bytes_per_row]` of type q4_0, q4_1 or q8_0."""
    rows = np.ascontiguousarray(rows)
    segment = Segment(
        format=FORMAT_Q8 if dtype_name == "q8_0" else FORMAT_Q4,
        n=rows.shape[0],
        k=in_features,
        group=32,
        half_scales=1,
        has_minimums=int(dtype_name == "q4_1"),
        zero={"q4_0": 8, "q4_1": 0, "q8_0": 128}[dtype_name],
    )
    matrix = _matrix(library, segment, in_features)
    library.hr_pack_blocks(matrix.segments[0], rows.ctypes.data)
    return matrix


def pack_codes(
    library: Any,
    codes: npt.NDArray[np.uint8],
    *,
    bits: int,
    scales: npt.NDArray[Any],
    zero: int,
    minimums: npt.NDArray[Any] | None,
) -> PackedMatrix:
    """Pack group-quantised weights: `scale * (code - zero)`, or `scale * code + minimum`.

    Args:
        library: From `load_library`.
        codes: `[n, k]`, below `2 ** bits`; `k` is a multiple of 32.
        bits: 4 are kept as nibbles, more as bytes.
        scales: `[n, num_scales]`, float16 or float32; groups of 16, or of a multiple of 32.
        zero: Code of 0; not looked at where there are minimums.
        minimums: The same shape and type as the scales, or None.
    """
    n, k = codes.shape
    # Products count codes from the middle of what holds them.
    shift = 0 if bits == 4 else 128 - (1 << (bits - 1))
    segment = Segment(
        format=FORMAT_Q4 if bits == 4 else FORMAT_Q8,
        n=n,
        k=k,
        group=16 if k // scales.shape[1] == 16 else 32,
        half_scales=int(scales.dtype == np.float16),
        has_minimums=int(minimums is not None),
        zero=shift + (0 if minimums is not None else zero),
    )
    matrix = _matrix(library, segment, k)
    # Kept until the call is over.
    codes, scales = np.ascontiguousarray(codes), np.ascontiguousarray(scales)
    minimums = None if minimums is None else np.ascontiguousarray(minimums)
    minimums_address = None if minimums is None else minimums.ctypes.data
    library.hr_pack_codes(matrix.segments[0], codes.ctypes.data, scales.ctypes.data, minimums_address, scales.shape[1], shift)
    return matrix


def _matrix(library: Any, segment: Segment, in_features: int) -> PackedMatrix:
    """Memory for a segment, zeroed."""
    data = aligned_zeros(padded(segment.n, PANEL_ROWS) // PANEL_ROWS * library.hr_unit_bytes(segment), np.uint8)
    segment.data = data.ctypes.data
    return PackedMatrix((segment,), segment.n, in_features, (data,))


def split_in_two(library: Any, matrix: PackedMatrix) -> tuple[Segment, Segment] | None:
    """The two halves of a matrix's outputs, where each half is packed in one piece and fills its panels; else None."""
    half = matrix.out_features // 2
    if half % PANEL_ROWS or matrix.out_features % 2:
        return None
    segments = matrix.segments
    if len(segments) == 2 and segments[0].n == half:
        return segments[0], segments[1]
    if len(segments) != 1:
        return None
    first, second = Segment.from_buffer_copy(segments[0]), Segment.from_buffer_copy(segments[0])
    first.n = second.n = half
    second.out_offset = half
    second.data = segments[0].data + half // PANEL_ROWS * library.hr_unit_bytes(segments[0])
    return first, second


def stack(parts: list[PackedMatrix]) -> PackedMatrix:
    """Several matrices of one input as one; their outputs follow one another."""
    segments: list[Segment] = []
    offset = 0
    for part in parts:
        for segment in part.segments:
            placed = Segment.from_buffer_copy(segment)
            placed.out_offset = offset + segment.out_offset
            segments.append(placed)
        offset += part.out_features
    return PackedMatrix(tuple(segments), offset, parts[0].in_features, tuple(array for part in parts for array in part.arrays))
