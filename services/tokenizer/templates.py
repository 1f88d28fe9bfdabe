"""Chat templates: from a conversation to the text of a prompt, by the rules of Hugging Face.

Templates are Jinja programs from the model directory, so they run in a sandbox without access to Python's insides, and their
output is bounded here. Their time and memory are bounded outside, by running in a process that can be killed (renderer.py):
nothing inside a process can end every loop and every single long operation for certain.

Source: transformers 5, chat templating (whitespace rules, globals, and how a final message is continued); tests/parity compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.errors import HeadraceError, InvalidRequestError, ModelError, RequestFailedError
from services.tokenizer.conversations import (
    tools_text,
    with_argument_texts,
    with_contents,
    with_descriptions,
    with_granite_calls,
    with_text,
    written_out,
)
from services.tokenizer.template_source import EXTENSIONS, takes_tools

Message = Mapping[str, Any]
"""One turn as conversations.py makes it: `role`, `content`, and what else it has."""

_CONTINUE_MARK: Final = "\ue000the final message goes on here"


class ChatTemplate:
    """One model's compiled template."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str], model: str, output_max: int, strftime: Callable[[str], str]
    ) -> None:
        """Compile a template.

        Args:
            source: Jinja source.
            special_tokens: Named special tokens, such as `bos_token`, which templates refer to.
            model: Named in errors.
            output_max: Most characters of a rendered prompt.
            strftime: Formats the present time; templates call it as `strftime_now`.

        Raises:
            ModelError: The source is no valid template.
        """
        self._special_tokens = dict(special_tokens)
        self._model = model
        self._output_max = output_max
        self._takes_tools = takes_tools(source)
        self._is_granite = "<|tool_call|>" in source and "tool_calls" not in source
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=EXTENSIONS)
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=strftime, dict=_make_dict, namespace=_Namespace)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"model {model}: its chat template cannot be compiled: {error}; pull the model again") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Render a conversation.

        Args:
            messages: The turns, oldest first.
            add_generation_prompt: Open the assistant's turn at the end.
            continue_final_message: Leave the last assistant turn open.
            tools: Tools the model may call. A template that knows none gets them in words.
            kwargs: Further variables of the template.

        Raises:
            InvalidRequestError: The conversation is empty, cannot be continued, is refused by the template, or becomes too long.
            RequestFailedError: The template failed on this conversation.
        """
        turns = [dict(message) for message in messages]
        if not turns:
            raise InvalidRequestError("messages: there are 0, at least 1 is needed", param="messages")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt are both true; a turn is either continued or opened: set one",
                param="continue_final_message",
            )

        def run(turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
            variables: dict[str, Any] = {**kwargs, **self._special_tokens, "tools": list(tools) or None, "documents": None}
            if continue_final_message:
                return self._run_open(turns, variables)
            return self._run(turns, variables, add_generation_prompt=add_generation_prompt)

        if self._takes_tools:
            return run(with_granite_calls(turns) if self._is_granite else turns, tools)
        turns = written_out(turns)
        return _run_with_text(run, turns, tools_text(tools)) if tools else run(turns)

    def _run_open(self, turns: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """Mark the end of the final message, render, and cut at the mark."""
        role, content = turns[-1].get("role"), turns[-1].get("content") or ""
        if role != "assistant":
            raise InvalidRequestError(
                f"continue_final_message is true, but the last message is of role {role!r}; it must be 'assistant'",
                param="continue_final_message",
            )
        mark = _CONTINUE_MARK
        while any(mark in (turn.get("content") or "") for turn in turns):
            mark += "\ue000"
        # The space after the mark shows whether the template trims messages.
        turns = [*turns[:-1], {**turns[-1], "content": f"{content}{mark} "}]
        rendered = self._run(turns, variables, add_generation_prompt=False)
        end = rendered.rfind(mark)
        if end < 0 or content.strip() not in rendered:
            raise InvalidRequestError(
                f"continue_final_message: the chat template of {self._model} does not show the final message as it is, "
                "so that it cannot be continued",
                param="continue_final_message",
            )
        is_trimmed = rendered[end + len(mark) : end + len(mark) + 1] != " "
        return rendered[:end].rstrip() if is_trimmed else rendered[:end]

    def _run(self, turns: list[dict[str, Any]], variables: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
        shown = {**variables, "messages": turns, "add_generation_prompt": add_generation_prompt}
        try:
            return self._generate(shown)
        except (RequestFailedError, InvalidRequestError) as error:
            if _is_refusal(error):
                raise
            return self._generate_repaired(shown, error)

    def _generate_repaired(self, shown: Mapping[str, Any], failure: HeadraceError) -> str:
        """What the template makes of the conversation with as few repairs as it can do with; else why it refuses it, or failed."""
        repairs = [repair for repair in _REPAIRS if repair(shown) != shown]
        for num in range(1, len(repairs) + 1):
            for chosen in combinations(repairs, num):
                repaired = shown
                for repair in chosen:
                    repaired = repair(repaired)
                try:
                    return self._generate(repaired)
                except (RequestFailedError, InvalidRequestError) as error:
                    failure = error if _is_refusal(error) else failure
        raise failure

    def _generate(self, variables: Mapping[str, Any]) -> str:
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(variables):
                num_chars += len(part)
                if num_chars > self._output_max:
                    raise InvalidRequestError(
                        f"messages: the chat template makes more than {self._output_max} characters of them; shorten them",
                        param="messages",
                    )
                parts.append(part)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"messages: the chat template of {self._model} refuses this conversation: {error}", param="messages"
            ) from error
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
            raise RequestFailedError(
                f"messages: the chat template of {self._model} failed on this conversation: {type(error).__name__}: {error}",
                param="messages",
            ) from error
        return "".join(parts)


def _run_with_text(run: Callable[[list[dict[str, Any]]], str], turns: list[dict[str, Any]], text: str) -> str:
    """A prompt with a text of ours in the system turn; where the template has no place for one, in the first user's.

    A system turn of the client's stays where it is, and so does the template's word on it.
    """
    has_system = turns[0]["role"] == "system"
    try:
        prompt = run(with_text(turns, text, in_system=True))
    except InvalidRequestError:
        if has_system:
            raise
    else:
        # Some templates leave out turns of roles that they do not know.
        if has_system or text in prompt:
            return prompt
    return run(with_text(turns, text, in_system=False))


def _of(name: str, change: Callable[[Any], Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    return lambda shown: {**shown, name: change(shown[name]) if shown[name] else shown[name]}


_REPAIRS: Final = (
    # Some templates join a call's arguments with text; they want them as text.
    _of("messages", with_argument_texts),
    # Some look into the content of every turn, or join it (GPT-OSS, Phi-4-mini).
    _of("messages", with_contents),
    # Some join a tool's description with text (GPT-OSS).
    _of("tools", with_descriptions),
)
"""What is done to a conversation on which a template fails. Others tell turns and tools apart by what these fill in."""


def _is_refusal(error: HeadraceError) -> bool:
    """Whether a template has looked at a conversation and does not want it, rather than failed on it."""
    return isinstance(error, InvalidRequestError) and not isinstance(error.__cause__, jinja2.UndefinedError)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscore names: they lead to Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is taken by position, so that a template may name an attribute so.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute must not begin with an underscore: {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(...)` as a function: the class itself would be a way to its methods."""
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
