"""The variants of kernels that Triton would compile on a GPU for what is launched here, where nothing is compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels.launching import Launch

Variant = tuple[Any, ...]
"""A kernel's name, what Triton makes of each argument, and the options of the launch."""


class Variants:
    """Stands between launches and the interpreter, until the test ends.

    Attributes:
        found: All so far.
        by_launch: Those that each planned launch was; on a GPU only the first time is Triton asked.
        is_computing: Whether what is launched is computed, too.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: set[Variant] = set()
        self.by_launch: dict[Launch, set[Variant]] = {}
        self.is_computing = True
        run, call = InterpretedFunction.run, Launch.__call__
        launching: list[Launch] = []

        def watched(function: InterpretedFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            _, specialization, options = _binder(function)(*args, **kwargs)
            variant = (function.fn.__name__, *specialization, *sorted(options.items()))
            self.found.add(variant)
            if launching:
                self.by_launch.setdefault(launching[-1], set()).add(variant)
            return run(function, *args, grid=grid, warmup=warmup, **kwargs) if self.is_computing else None

        def noted(launch: Launch, *tensors: torch.Tensor | None) -> None:
            launching.append(launch)
            call(launch, *tensors)
            launching.pop()

        monkeypatch.setattr(InterpretedFunction, "run", watched)
        monkeypatch.setattr(Launch, "__call__", noted)


@cache
def _binder(function: InterpretedFunction[Any]) -> Any:
    """What a compiled kernel asks at each launch whether it has been compiled for such arguments."""
    names = ("do_not_specialize", "do_not_specialize_on_alignment")
    compiled: JITFunction[Any] = JITFunction(function.fn, **{name: function.kwargs[name] for name in names})
    return create_function_from_signature(compiled.signature, compiled.params, BaseBackend)
