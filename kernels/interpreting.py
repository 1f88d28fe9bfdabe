"""Triton's interpreter, which runs kernels on the CPU: whether it is on, and its roundings put right.

Triton 3.9's interpreter cuts float32 off to bfloat16 where every GPU rounds to nearest, loses carries when it rounds to 8-bit
floats, and multiplies matrices of bfloat16 as if their bits were integers. `install_roundings` replaces these, so that what is
compared under the interpreter is the kernel. Other arithmetic on bfloat16 is wrong there still: kernels cast to float32 first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

FP8_MAX: Final = 448.0
"""Largest finite value of float8_e4m3fn; Triton's casts saturate there, torch's give NaN."""


def is_interpreted() -> bool:
    """Whether kernels imported now run under the interpreter (`TRITON_INTERPRET=1`)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def install_roundings() -> None:
    """Put right the casts between float32 and bfloat16 or float8_e4m3fn, and the matrix product. Again does no harm."""
    from triton.runtime.interpreter import InterpreterBuilder

    if not hasattr(InterpreterBuilder, "_exact_casts"):
        InterpreterBuilder.cast_impl = _exactly(InterpreterBuilder.cast_impl)
        InterpreterBuilder.create_fp_to_fp = _exactly(InterpreterBuilder.create_fp_to_fp)
        InterpreterBuilder.create_dot = _widened(InterpreterBuilder.create_dot)
        InterpreterBuilder._exact_casts = True


def _exactly(cast: Callable[..., Any]) -> Callable[..., Any]:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    stored = {tl.bfloat16: (torch.bfloat16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, np.uint8)}

    def cast_exactly(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target in stored:
            dtype, bits = stored[target]
            wide = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32))
            if dtype.itemsize == 1:
                wide = wide.clamp(-FP8_MAX, FP8_MAX)
            narrow = wide.to(dtype).view(torch.uint16 if bits is np.uint16 else torch.uint8)
            return TensorHandle(narrow.numpy().reshape(src.data.shape), target)
        if source in stored and target == tl.float32:
            dtype, bits = stored[source]
            narrow = torch.from_numpy(np.ascontiguousarray(src.data, dtype=bits))
            return TensorHandle(narrow.view(dtype).float().numpy().reshape(src.data.shape), target)
        return cast(self, src, dst_type, *rest)

    return cast_exactly


def _widened(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    import triton.language as tl

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        narrow = (tl.bfloat16, tl.float8e4nv)
        a, b = (self.cast_impl(each, tl.float32) if each.dtype.scalar in narrow else each for each in (a, b))
        return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    return dot
