"""Triton's interpreter, which runs kernels on the CPU: whether it is on, and its roundings put right.

Triton's interpreter (3.7 and 3.9) cuts float32 off to bfloat16 where every GPU rounds to nearest, loses carries when it rounds to
8-bit floats, and multiplies matrices of bfloat16 as if their bits were integers. `prepare_interpreter` replaces these, so that what
is compared under the interpreter is the kernel. Other arithmetic on bfloat16 is wrong there still: kernels cast to float32 first.

Its products take tiles of any size; here they have the least sizes of NVIDIA's matrix units, so that what compiles nowhere fails.

It also swaps the language's functions for its own anew at every call of a helper, `tl.sum` among them; here that is done once a
launch, which makes the attention kernels' tests four times as fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import torch

FP8_MAX: Final = 448.0
"""Largest finite value of float8_e4m3fn; Triton's casts saturate there, torch's give NaN."""


def is_interpreted() -> bool:
    """Whether kernels imported now run under the interpreter (`TRITON_INTERPRET=1`)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def start_interpreter() -> None:
    """Have the kernels of this process run under the interpreter, on the CPU; again does no harm.

    Raises:
        RuntimeError: Triton was imported before, without its interpreter: its own functions are compiled or interpreted from their
            import on.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not is_interpreted():
        raise RuntimeError("triton was imported without its interpreter (TRITON_INTERPRET=1), which cannot be changed any more")
    prepare_interpreter()


def prepare_interpreter() -> None:
    """Put the interpreter right, before kernels run under it; again does no harm."""
    _install_roundings()
    _install_least_tiles()
    _install_single_patching()


def _install_roundings() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    if not hasattr(InterpreterBuilder, "_exact_casts"):
        InterpreterBuilder.cast_impl = _exactly(InterpreterBuilder.cast_impl)
        InterpreterBuilder.create_fp_to_fp = _exactly(InterpreterBuilder.create_fp_to_fp)
        InterpreterBuilder.create_dot = _widened(InterpreterBuilder.create_dot)
        InterpreterBuilder._exact_casts = True


def _install_least_tiles() -> None:
    from triton.runtime.interpreter import interpreter_builder

    # Rows, columns and inner size; the others are padded where they are too small.
    interpreter_builder.codegen_fns["min_dot_size"] = lambda x, y: (1, 1, 32 if x.scalar.primitive_bitwidth == 8 else 16)


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


class _PatchOnce:
    """Stands for the interpreter's `_patch_lang`: patches all it ever patches at a launch, and nothing at calls within it.

    numpy's complaints of floating-point overflow and of infinity less infinity are silent in a launch, as they are on a GPU.
    """

    def __init__(self, patch_lang: Callable[[Any], Any]) -> None:
        import numpy as np
        import triton.language as tl

        self._set_complaints = np.seterr
        self._complaints: Any = {}
        self._patch_lang = patch_lang
        # The function is looked at for the modules that it sees, no more.
        self._sees_all = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        self._scope: Any = None

    def __call__(self, fn: Any) -> Any:
        """Patch, unless a launch that is still running has; gives what restores, which only that launch calls."""
        if self._scope is None:
            self._scope = self._patch_lang(self._sees_all)
            self._complaints = self._set_complaints(all="ignore")
        return self

    def restore(self) -> None:
        """Undo all, at the end of a launch."""
        scope, self._scope = self._scope, None
        self._set_complaints(**self._complaints)
        scope.restore()


def _install_single_patching() -> None:
    from triton.runtime import interpreter

    if not isinstance(interpreter._patch_lang, _PatchOnce):
        interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
