"""`torch.cuda` as far as the worker uses it, on the CPU: graphs that record and compute again, streams and memory that are watched.

A captured graph is the list of what torch and Triton were asked for while it was captured; a replay asks again, over the same
tensors. So it depends on nothing but what lies in its inputs, as on a GPU, and what cannot be captured there is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

T = torch.Tensor
WAITS = (T.item, T.tolist, T.numpy, T.cpu, T.nonzero, T.__float__, T.__int__, T.__bool__, T.__index__, torch.nonzero)
"""What makes the host wait for the device, and so cannot be captured."""


class Refusing(TorchFunctionMode):
    """Refuses what waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Notes down what torch computes."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._graph.is_launching:
            return func(*args, **kwargs)
        outputs = func(*args, **kwargs)

        def again() -> None:
            for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._graph.launches.append(again)
        return outputs


class FakeGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []
        self.is_launching = False
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for launch in self.launches:
            launch()

    def pool(self) -> str:
        return "pool"


class FakeStream:
    """`torch.cuda.Stream`."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self._events = events

    def wait_stream(self, other: FakeStream) -> None:
        self._events.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    """`torch.cuda.Event`."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def record(self) -> None:
        self._events.append("record")

    def synchronize(self) -> None:
        self._events.append("synchronize")


class FakeCuda:
    """The module.

    Attributes:
        events: What was asked for, in order, but for computing.
        free: Bytes that `mem_get_info` gives.
        peak: Bytes that a measured function takes.
    """

    class OutOfMemoryError(RuntimeError):
        pass

    def __init__(self, *, free: int = 1 << 30) -> None:
        self.events: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.pools: list[Any] = []
        self.free = free
        self.peak = 1 << 20
        self._capturing: FakeGraph | None = None
        self._stream = "main"

    def is_available(self) -> bool:
        return True

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream("side", self.events)

    def Event(self) -> FakeEvent:
        return FakeEvent(self.events)

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph()

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self._stream, self.events)

    def is_current_stream_capturing(self) -> bool:
        return self._capturing is not None

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._stream = self._stream, stream.name
        self.events.append(f"on {stream.name}")
        yield
        self._stream = before
        self.events.append(f"on {before}")

    @contextmanager
    def graph(self, graph: FakeGraph, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        self._capturing = graph
        run = GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            def again() -> None:
                graph.is_launching = True
                with torch._C.DisableTorchFunction():
                    run(executor, *args, **kwargs)
                graph.is_launching = False

            again()
            graph.launches.append(again)

        GridExecutor.__call__ = launch
        try:
            with Refusing(), Recording(graph):
                yield
        finally:
            GridExecutor.__call__ = run
            self._capturing = None
        self.graphs.append(graph)

    def synchronize(self, device: torch.device) -> None:
        self.events.append("synchronize all")

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, 2 << 30

    def empty_cache(self) -> None:
        self.events.append("empty cache")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.events.append("reset peak")

    def memory_allocated(self, device: torch.device) -> int:
        return 1000

    def max_memory_allocated(self, device: torch.device) -> int:
        return 1000 + self.peak
