"""How a model writes tool calls and reasoning, told from its chat template: by the marks that it teaches the model. Pure."""

from __future__ import annotations

from typing import Final

from headrace.output_formats import CHANNELS_FORMAT, REASONING_FORMATS
from services.tokenizer.config import AUTO, NONE
from services.tokenizer.constraints.reasoning_first import Block
from services.tokenizer.template_source import takes_tools

# The first format of which all marks stand in the template; a mark of many formats comes after those that have more.
_TOOL_MARKS: Final = (
    ("gpt_oss", ("<|channel|>", "<|start|>")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("qwen3_coder", ("<function=",)),
    ("glm", ("<arg_key>",)),
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("granite", ("<|tool_call|>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ('"parameters":', "tools")),
)
_REASONING_MARKS: Final = (
    ("gpt_oss", ("<|channel|>", "<|start|>")),
    ("kimi", ("◁think▷",)),
    ("deepseek_r1", ("<｜Assistant｜>", "</think>")),
    ("minimax", ("<minimax:tool_call>", "<think>")),
    ("minimax", ("]~b]", "<think>")),
    ("glm", ("[gMASK]", "<think>")),
    ("nemotron_nano_v3", ("</think>", "truncate_history_thinking")),
    ("qwen3", ("<think>",)),
    ("qwen3", ("</think>",)),
)
GENERIC_TOOL_FORMAT: Final = "hermes"
"""What a model whose template knows no tools is told to write (conversations.py)."""


def tool_format_of(template: str | None, setting: str) -> str:
    """The format of tool calls; the setting leads, unless it leaves the choice to the template."""
    if setting != AUTO:
        return "" if setting == NONE else setting
    if template is None:
        return ""
    return _first(template, _TOOL_MARKS) if takes_tools(template) else GENERIC_TOOL_FORMAT


def reasoning_format_of(template: str | None, setting: str) -> str:
    """The format of reasoning; empty for a model that does not reason."""
    if setting != AUTO:
        return "" if setting == NONE else setting
    return "" if template is None else _first(template, _REASONING_MARKS)


def starts_in_reasoning(reasoning_format: str, prompt: str, *, continued: str | None, is_turn_opened: bool) -> bool:
    """Whether an output begins inside a block of reasoning.

    Args:
        reasoning_format: One of the known, or empty.
        prompt: What the template made.
        continued: The assistant's text that the model goes on with; None where it begins a turn.
        is_turn_opened: The prompt ends with the opening of the assistant's turn.
    """
    form = REASONING_FORMATS.get(reasoning_format)
    if form is None:
        return False
    if continued is not None:
        return continued.rfind(form.opening) > continued.rfind(form.closing)
    if not is_turn_opened:
        return False
    tail = prompt.rstrip()
    return tail.endswith(form.opening) or (form.is_always_open and not tail.endswith(form.closing))


def block_before(reasoning_format: str, prompt: str, *, continued: str | None, is_turn_opened: bool) -> Block | None:
    """The block of reasoning that may stand before an output's own, for grammars; None where there can be none.

    There is none where the turn has begun already, or a block stands closed in the prompt, as templates write that are told not to
    have the model reason. GPT-OSS writes messages in channels and no block: a grammar holds there from the first token on.

    Args:
        reasoning_format: One of the known, or empty.
        prompt: What the template made.
        continued: The assistant's text that the model goes on with; None where it begins a turn.
        is_turn_opened: The prompt ends with the opening of the assistant's turn.
    """
    form = REASONING_FORMATS.get(reasoning_format)
    if form is None or reasoning_format == CHANNELS_FORMAT:
        return None
    is_open = starts_in_reasoning(reasoning_format, prompt, continued=continued, is_turn_opened=is_turn_opened)
    may_open = continued is None and is_turn_opened and not prompt.rstrip().endswith(form.closing)
    return Block(form.opening, form.closing, is_open=is_open) if is_open or may_open else None


def _first(template: str, table: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    return next((name for name, marks in table if all(mark in template for mark in marks)), "")
