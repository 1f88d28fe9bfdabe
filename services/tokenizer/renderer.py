"""Renders chat templates in a process of its own, which is killed when it takes too long.

A template is a program, and the text it works on comes from clients. Inside one process nothing ends every loop and every long
single operation for certain (an exception waits for the next bytecode, a signal for the main thread), so a renderer is a child
that gets a conversation over a pipe, with an address-space limit, and SIGKILL at the deadline. Its start costs a fraction of a
second, once; a conversation costs one exchange over the pipe.

This file is part of the shell, see `killable.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from headrace.errors import ModelError, RequestFailedError
from services.tokenizer.killable import Answer, GoneError, KillableChild, LateError, serve
from services.tokenizer.templates import ChatTemplate, Message

_START_TIMEOUT_S: Final = 30.0
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

    def start(self) -> None:
        """Start the child and have it compile the template.

        Raises:
            ModelError: The template cannot be compiled, or not in time.
        """
        self._child.start()
        try:
            self._child.ask(self._setup, _START_TIMEOUT_S)
        except (LateError, GoneError) as error:
            status = self._child.kill()
            raise ModelError(
                f"model {self._model}: its chat template could not be compiled in {_START_TIMEOUT_S} s "
                f"(the renderer ended with status {status})"
            ) from error
        except ModelError:
            self._child.kill()
            raise

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
        """
        if not self._child.is_running:
            self.start()
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
