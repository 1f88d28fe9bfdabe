"""Constraints on their way to a compiler and back, beside the event loop and beside the threads that encode. Part of the shell.

A constraint that takes long holds up other constraints at most: prompts without one never come here.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from headrace.errors import HeadraceError, InvalidRequestError, OverloadedError, RequestFailedError
from headrace.telemetry import logs
from headrace.v1.common_pb2 import Constraint, ConstraintKind
from services.tokenizer.config import Settings
from services.tokenizer.constraints.compiler import CompileLimits, ConstraintCompiler
from services.tokenizer.constraints.reasoning_first import Block
from services.tokenizer.constraints.verdicts import Verdicts

log = logs.get_logger()

WAITING_MAX: Final = 64
"""Constraints that wait for a compiler; one more is refused as overloaded, so that they never fill the tokenizer's own queue."""
_PREFIX: Final = "CONSTRAINT_KIND_"


class ConstraintDesk:
    """Has constraints compiled, one a compiler at a time, and remembers what became of them.

    Args:
        compilers: One a thread.
        max_bytes: Of the longest constraint.
        cache_bytes: Most memory of what is remembered.
    """

    def __init__(self, compilers: Sequence[ConstraintCompiler], *, max_bytes: int, cache_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._compilers = tuple(compilers)
        self._idle: queue.SimpleQueue[ConstraintCompiler] = queue.SimpleQueue()
        for compiler in compilers:
            self._idle.put(compiler)
        self._verdicts = Verdicts(cache_bytes)
        self._executor = ThreadPoolExecutor(len(self._compilers), thread_name_prefix="constraint")
        self._num_open = 0
        self._is_stopped = False

    def take(
        self, constraint: Constraint, param: str, tell: Callable[[str | HeadraceError], None], *, block: Block | None = None
    ) -> None:
        """Compile a constraint, unless it is known; `tell` is called with its grammar or its error, on the event loop.

        Args:
            constraint: What the client wrote.
            param: The client's field, named in errors.
            tell: Takes the verdict.
            block: The block of reasoning that the output may begin with; None for none.
        """
        kind, source = constraint.kind, constraint.source
        num_bytes = len(source.encode())
        if num_bytes > self._max_bytes:
            message = f"{param}: {num_bytes} bytes, the limit is {self._max_bytes} (tokenizer.constraint_bytes_max)"
            tell(InvalidRequestError(message, param=param))
            return
        known = self._verdicts.find(kind, source, param, block)
        if known is not None:
            tell(known)
            return
        if self._num_open >= len(self._compilers) + WAITING_MAX:
            message = f"tokenizer: {WAITING_MAX} constraints wait to be compiled, which is the limit; retry in 1 s"
            tell(OverloadedError(message, retry_after_s=1.0))
            return
        self._num_open += 1
        loop = asyncio.get_running_loop()

        def on_loop(verdict: str | HeadraceError, is_lasting: bool) -> None:
            self._num_open -= 1
            if self._is_stopped:
                return
            if is_lasting and isinstance(verdict, (str, InvalidRequestError)):
                self._verdicts.keep(kind, source, param, verdict, block)
            tell(verdict)

        def on_done(future: Future[tuple[str | HeadraceError, bool]]) -> None:
            if not self._is_stopped:
                loop.call_soon_threadsafe(on_loop, *future.result())

        self._executor.submit(self._compile, kind, source, param, block).add_done_callback(on_done)

    async def stop(self) -> None:
        """Drop what waits and end the compilers."""
        self._is_stopped = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        for compiler in self._compilers:
            compiler.interrupt()
        await asyncio.to_thread(self._executor.shutdown, wait=True)
        for compiler in self._compilers:
            compiler.close()

    def _compile(self, kind: ConstraintKind, source: str, param: str, block: Block | None) -> tuple[str | HeadraceError, bool]:
        """The verdict, and whether it would be the same again: what took too long now may not on an idle machine."""
        compiler = self._idle.get()
        try:
            name = ConstraintKind.Name(kind).removeprefix(_PREFIX).lower()
            return compiler.compile(name, source, param=param, block=block), True
        except HeadraceError as error:
            return error, compiler.pid is not None
        except Exception:
            log.exception("constraint.failed")
            return RequestFailedError("tokenizer: internal error while compiling the constraint; its log has more"), False
        finally:
            self._idle.put(compiler)


def make_desk(
    settings: Settings, directory: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...], tool_format: str
) -> ConstraintDesk:
    """The desk of one model, as set; no compiler is started yet."""
    limits = CompileLimits(settings.constraint_timeout_s, settings.constraint_memory_bytes)
    compilers = [
        ConstraintCompiler(directory, vocab_size=vocab_size, eos_token_ids=eos_token_ids, limits=limits, tool_format=tool_format)
        for _ in range(settings.num_constraint_threads)
    ]
    return ConstraintDesk(compilers, max_bytes=settings.constraint_bytes_max, cache_bytes=settings.constraint_cache_bytes)
