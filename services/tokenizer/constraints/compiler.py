"""Tries constraints out in a process of their own, which is killed when one takes too long. Part of the shell, see `killable.py`.

Compiling is a program that the client writes: nested alternatives and bounded repetitions grow without end. The child answers with
the grammar to hand to workers, for which compiling has just been shown to be cheap, or with what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from headrace.errors import HeadraceError, InvalidRequestError, RequestFailedError
from services.tokenizer.constraints.reasoning_first import Block
from services.tokenizer.killable import Answer, GoneError, KillableChild, LateError, serve

START_TIMEOUT_S: Final = 30.0
_ANSWER_BYTES_MAX: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class CompileLimits:
    """Bounds of one compilation."""

    timeout_s: float
    memory_bytes: int


class ConstraintCompiler:
    """One child for one model. It is started when first wanted: many servers never see a constraint. For one thread at a time."""

    def __init__(
        self,
        directory: Path,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        limits: CompileLimits,
        tool_format: str = "",
    ) -> None:
        self._setup = {
            "directory": str(directory),
            "vocab_size": vocab_size,
            "eos_token_ids": list(eos_token_ids),
            "memory_bytes": limits.memory_bytes,
            "tool_format": tool_format,
        }
        self._limits = limits
        self._child = KillableChild("services.tokenizer.constraints.compiler", answer_bytes_max=_ANSWER_BYTES_MAX)

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.pid

    def compile(self, kind: str, source: str, *, param: str, block: Block | None = None) -> str:
        """The grammar of a constraint, for workers.

        Args:
            kind: A kind of the wire's Constraint, in lower case.
            source: What the client wrote.
            param: The client's field, named in errors.
            block: The block of reasoning that the output may begin with; None for none.

        Raises:
            InvalidRequestError: It is wrong, cannot be enforced, takes too long or too much memory.
            RequestFailedError: The child could not be started.
        """
        if not self._child.is_running:
            self._start()
        question = {"kind": kind, "source": source, "param": param, "block": None if block is None else asdict(block)}
        try:
            grammar: str = self._child.ask(question, self._limits.timeout_s)["grammar"]
        except LateError as error:
            self._child.kill()
            raise InvalidRequestError(
                f"{param}: compiling it took longer than {self._limits.timeout_s:g} s (tokenizer.constraint_timeout_s) and was "
                "stopped; make it smaller: fewer alternatives inside one another, shorter repetitions",
                param=param,
            ) from error
        except GoneError as error:
            status = self._child.kill()
            raise InvalidRequestError(
                f"{param}: the process compiling it ended with status {status}; its memory limit is "
                f"{self._limits.memory_bytes} bytes (tokenizer.constraint_memory_bytes); make it smaller",
                param=param,
            ) from error
        return grammar

    def interrupt(self) -> None:
        """Kill the child from another thread: a compilation under way fails at once. `close` must follow."""
        self._child.interrupt()

    def close(self) -> None:
        """End the child, if there is one."""
        self._child.kill()

    def _start(self) -> None:
        self._child.start()
        try:
            self._child.ask(self._setup, START_TIMEOUT_S)
        except (LateError, GoneError) as error:
            status = self._child.kill()
            raise RequestFailedError(
                f"tokenizer: the process that compiles constraints could not be started in {START_TIMEOUT_S:g} s (status {status})"
            ) from error
        except HeadraceError:
            self._child.kill()
            raise


def _begin(setup: Mapping[str, Any]) -> Answer:
    # Heavy, and not wanted by the parent.
    from headrace.grammars import load_vocabulary
    from headrace.models.tokenizer_tokens import special_tokens_of
    from services.tokenizer.constraints.sources import ModelText, grammar_of

    directory = Path(setup["directory"])
    special_tokens = special_tokens_of(directory)
    vocabulary = load_vocabulary(directory, vocab_size=setup["vocab_size"], eos_token_ids=tuple(setup["eos_token_ids"]))

    def answer(question: Mapping[str, Any]) -> dict[str, Any]:
        block = question["block"]
        grammar = grammar_of(
            question["kind"],
            question["source"],
            param=question["param"],
            vocabulary=vocabulary,
            model=ModelText(special_tokens, setup["tool_format"], None if block is None else Block(**block)),
        )
        return {"grammar": grammar}

    return answer


if __name__ == "__main__":
    serve(_begin)
