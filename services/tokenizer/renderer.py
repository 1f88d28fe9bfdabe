"""Renders chat templates in a process of its own, which is killed when it takes too long.

A template is a program, and the text it works on comes from clients. Inside one process nothing ends every loop and every long
single operation for certain (an exception waits for the next bytecode, a signal for the main thread), so a renderer is a child
that gets a conversation over a pipe, with an address-space limit, and SIGKILL at the deadline. Its start costs a fraction of a
second, once; a conversation costs one exchange over the pipe.

This file is part of the shell, see `killable.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from headrace.errors import HeadraceError, ModelError, RequestFailedError, UnavailableError
from services.tokenizer.killable import Answer, GoneError, KillableChild, LateError, serve
from services.tokenizer.templates import ChatTemplate, Message

_LOOK_S: Final = 10.0
"""A start that takes longer than this is looked after, and again after each further time as long."""
_START_CPU_S: Final = 30.0
"""A template that is not compiled within so much processor time of the renderer is refused; 0.2 s are usual, with all imports."""
_NUM_STARTS_MAX: Final = 3
_NUM_LOOKS_MAX: Final = 30

OnWait = Callable[[str], None]
"""Told what is waited for."""

# What JSON adds to a text at most: six bytes for a control character.
_ESCAPE_BYTES_MAX: Final = 6


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Bounds of one rendering."""

    timeout_s: float
    memory_bytes: int
    output_max: int
    """Most characters of a rendered prompt."""


class Renderer:
    """One child that renders one model's template. Not for use by two threads at once."""

    def __init__(self, template: str, *, special_tokens: Mapping[str, str], model: str, limits: RenderLimits) -> None:
        self._setup = {
            "template": template,
            "special_tokens": dict(special_tokens),
            "model": model,
            "output_max": limits.output_max,
            "memory_bytes": limits.memory_bytes,
        }
        self._model = model
        self._limits = limits
        self._child = KillableChild("services.tokenizer.renderer", answer_bytes_max=limits.output_max * _ESCAPE_BYTES_MAX)

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.pid

    def start(self, on_wait: OnWait = lambda reason: None) -> None:
        """Start the child and have it compile the template.

        On a loaded machine that takes as long as it takes: the template is judged by the processor time that it costs. A child
        that gets nothing done at all is replaced.

        Args:
            on_wait: Told from time to time what is waited for.

        Raises:
            ModelError: The template cannot be compiled, or not in the time for it.
            UnavailableError: No child got anything done, or one very little for very long.
        """
        for number in range(1, _NUM_STARTS_MAX + 1):
            if self._start_once(on_wait):
                return
            on_wait(f"the renderer of chat templates got nothing done in {_LOOK_S:g} s and is replaced ({number} times so far)")
        raise UnavailableError(
            f"tokenizer: the renderer of chat templates did not start, {_NUM_STARTS_MAX} times in a row; is the machine overloaded?"
        )

    def _start_once(self, on_wait: OnWait = lambda reason: None) -> bool:
        """Start one child; False when it got nothing done between two looks, and was ended."""
        self._child.start()
        looks = [0.0]

        def goes_on() -> bool:
            looks.append(self._child.cpu_s)
            what = f"the renderer of chat templates has started for {(len(looks) - 1) * _LOOK_S:g} s, of which it computed"
            on_wait(f"{what} {looks[-1]:.2f} s; at {_START_CPU_S:g} s the template is given up")
            return looks[-2] < looks[-1] < _START_CPU_S and len(looks) <= _NUM_LOOKS_MAX

        try:
            self._child.ask(self._setup, _LOOK_S, goes_on=goes_on)
        except LateError as error:
            self._child.kill()
            if looks[-1] >= _START_CPU_S:
                raise ModelError(
                    f"model {self._model}: its chat template could not be compiled in {_START_CPU_S:g} s of processor time"
                ) from error
            return False
        except GoneError as error:
            status = self._child.kill()
            raise ModelError(
                f"model {self._model}: its chat template could not be compiled: the renderer ended with status {status}; "
                f"its memory limit is {self._limits.memory_bytes} bytes (tokenizer.render_memory_bytes)"
            ) from error
        except HeadraceError:
            self._child.kill()
            raise
        return True

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Render a conversation; arguments and errors are those of `ChatTemplate.render`.

        Raises:
            InvalidRequestError: The conversation does not fit the template.
            RequestFailedError: The template failed, took too long, or took too much memory.
            UnavailableError: The child had ended, and another one did not start.
        """
        if not self._child.is_running and not self._start_once():
            raise UnavailableError("tokenizer: the renderer of chat templates ended and did not start again in time; ask again")
        request = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": list(tools),
            "kwargs": dict(kwargs),
        }
        try:
            text: str = self._child.ask(request, self._limits.timeout_s)["text"]
        except LateError as error:
            self._child.kill()
            raise RequestFailedError(
                f"messages: rendering the chat template of {self._model} took longer than {self._limits.timeout_s} s and was "
                "stopped; shorten the conversation, or raise tokenizer.render_timeout_s",
                param="messages",
            ) from error
        except GoneError as error:
            status = self._child.kill()
            raise RequestFailedError(
                f"messages: the process rendering the chat template of {self._model} ended with status {status}; "
                f"its memory limit is {self._limits.memory_bytes} bytes (tokenizer.render_memory_bytes)",
                param="messages",
            ) from error
        return text

    def interrupt(self) -> None:
        """Kill the child from another thread: a rendering under way fails at once. `close` must follow."""
        self._child.interrupt()

    def close(self) -> None:
        """End the child, if there is one."""
        self._child.kill()


def _begin(setup: Mapping[str, Any]) -> Answer:
    template = ChatTemplate(
        setup["template"],
        special_tokens=setup["special_tokens"],
        model=setup["model"],
        output_max=setup["output_max"],
        strftime=time.strftime,
    )
    return lambda conversation: {"text": template.render(**conversation)}


if __name__ == "__main__":
    serve(_begin)
