"""The variants of kernels that Triton would compile on a GPU for what is launched here, where nothing is compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

Variant = tuple[Any, ...]
"""A kernel's name, what Triton makes of each argument, and the options of the launch."""


class Variants:
    """Stands between launches and the interpreter, until the test ends.

    Attributes:
        found: All so far.
        is_computing: Whether what is launched is computed, too.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: set[Variant] = set()
        self.is_computing = True
        run = InterpretedFunction.run

        def watched(function: InterpretedFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            _, specialization, options = _binder(function)(*args, **kwargs)
            self.found.add((function.fn.__name__, *specialization, *sorted(options.items())))
            return run(function, *args, grid=grid, warmup=warmup, **kwargs) if self.is_computing else None

        monkeypatch.setattr(InterpretedFunction, "run", watched)


@cache
def _binder(function: InterpretedFunction[Any]) -> Any:
    """What a compiled kernel asks at each launch whether it has been compiled for such arguments."""
    names = ("do_not_specialize", "do_not_specialize_on_alignment")
    compiled: JITFunction[Any] = JITFunction(function.fn, **{name: function.kwargs[name] for name in names})
    return create_function_from_signature(compiled.signature, compiled.params, BaseBackend)
