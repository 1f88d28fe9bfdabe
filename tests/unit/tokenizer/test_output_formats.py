"""Formats told from chat templates, and prompts that end inside a reasoning block."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from headrace.output_formats import REASONING_FORMATS, TOOL_FORMATS
from services.tokenizer.config import Settings
from services.tokenizer.constraints.reasoning_first import Block
from services.tokenizer.output_formats import AUTO, block_before, reasoning_format_of, starts_in_reasoning, tool_format_of
from services.tokenizer.template_source import takes_tools

TEMPLATES = {
    "gpt-oss": ("{{ tools }}<|start|>assistant<|channel|>analysis<|message|>", "gpt_oss", "gpt_oss"),
    "kimi k2": ("{{ tools }}<|tool_calls_section_begin|>", "kimi_k2", ""),
    "deepseek v3": ("{{ tools }}<｜Assistant｜><｜tool▁calls▁begin｜>function\n```json", "deepseek_v3", ""),
    "deepseek r1": (
        "{{ tools }}<｜Assistant｜>{{ c.split('</think>') }}<｜tool▁calls▁begin｜>```json",
        "deepseek_v3",
        "deepseek_r1",
    ),
    "deepseek v3.1": ("{{ tools }}<｜Assistant｜></think><｜tool▁calls▁begin｜>", "deepseek_v31", "deepseek_r1"),
    "minimax": ("{{ tools }}<minimax:tool_call><think>", "minimax", "minimax"),
    "qwen3-coder": ("{{ tools }}<tool_call><function=", "qwen3_coder", ""),
    "nemotron": (
        "{{ tools }}<tool_call><function=<think></think>{{ truncate_history_thinking }}",
        "qwen3_coder",
        "nemotron_nano_v3",
    ),
    "glm": ("[gMASK]{{ tools }}<tool_call><arg_key><think></think>", "glm", "glm"),
    "qwen2.5": ("{{ tools }}<tool_call>", "hermes", ""),
    "qwen3": ("{{ tools }}<tool_call><think></think>", "hermes", "qwen3"),
    "granite 3": ("{{ tools }}respond only with <|tool_call|> followed by a JSON list", "granite", ""),
    "mistral": ("{{ tools }}[TOOL_CALLS]", "mistral", ""),
    "llama 4": ("{{ tools }}[func_name1(params)]", "pythonic", ""),
    "llama 3": ('{{ tools }}{"name": n, "parameters": p}', "llama3_json", ""),
    "no tools": ("{{ messages }}", "hermes", ""),
    "phi-4-mini": ("{% for m in messages %}{% if 'tools' in m %}{{ m['tools'] }}{% endif %}{% endfor %}", "hermes", ""),
    "tools of unknown form": ("{{ tools }}", "", ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_told_from_the_template(name: str) -> None:
    template, tool_format, reasoning_format = TEMPLATES[name]
    assert tool_format_of(template, AUTO) == tool_format
    assert reasoning_format_of(template, AUTO) == reasoning_format
    assert {tool_format, reasoning_format} <= {"", *TOOL_FORMATS, *REASONING_FORMATS}


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        ("{% if tools %}x{% endif %}", True),
        ("{% if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}{% for t in tools %}{{ t }}{% endfor %}", True),
        ("{% set tools = tools or [] %}", True),
        ("{% generation %}{{ tools | tojson }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}", True),
        ("{% set tools = messages[0]['tools'] %}{{ tools }}", False),
        ("{% macro show(tools) %}{{ tools }}{% endmacro %}{{ show(messages) }} no tools", False),
        ("You have no tools.{# tools #}{{ messages[0].tools }}", False),
        # Worked out by a compiler, these would take gigabytes and hours.
        ("{{ tools }}{{ 'a' * 10 ** 10 }}{{ ('a' * 10 ** 10) | upper }}{{ [1] * 10 ** 10 }}", True),
        ("{{ 'tools' * 10 ** 10 }}{{ 10 ** 10 ** 10 }}{{ 'a' | center(10 ** 10) }}", False),
        ("{% for tools %}", True),
    ],
)
def test_a_template_takes_tools_where_it_reads_the_variable(template: str, takes: bool) -> None:
    assert takes_tools(template) is takes


def test_the_setting_leads() -> None:
    assert tool_format_of("{{ tools }}<tool_call>", "mistral") == "mistral"
    assert tool_format_of("{{ tools }}<tool_call>", "none") == ""
    assert reasoning_format_of("", "qwen3") == "qwen3"
    assert reasoning_format_of("<think>", "none") == ""
    assert (tool_format_of(None, AUTO), reasoning_format_of(None, AUTO)) == ("", "")


def test_unknown_formats_are_refused_at_the_start() -> None:
    assert Settings(tool_parser="hermes", reasoning_parser="none").tool_parser == "hermes"
    with pytest.raises(ValidationError, match="must be one of auto, none, deepseek_v3"):
        Settings(tool_parser="hermez")
    with pytest.raises(ValidationError, match="must be one of auto, none, deepseek_r1"):
        Settings(reasoning_parser="qwen")


@pytest.mark.parametrize(
    ("form", "prompt", "starts"),
    [
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "say <think> here<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "<｜Assistant｜>", True),
        ("deepseek_r1", "<｜Assistant｜></think>", False),
        ("gpt_oss", "<|start|>assistant", False),
        ("", "<think>", False),
    ],
)
def test_a_prompt_may_end_inside_reasoning(form: str, prompt: str, starts: bool) -> None:
    assert starts_in_reasoning(form, prompt, continued=None, is_turn_opened=True) is starts
    assert not starts_in_reasoning(form, prompt, continued=None, is_turn_opened=False)


def test_a_continued_turn_is_inside_reasoning_until_it_ends() -> None:
    assert starts_in_reasoning("qwen3", "", continued="<think>hm", is_turn_opened=False)
    assert not starts_in_reasoning("qwen3", "", continued="<think>hm</think>so", is_turn_opened=False)
    assert not starts_in_reasoning("qwen3", "", continued="so", is_turn_opened=False)


@pytest.mark.parametrize("form", REASONING_FORMATS)
def test_a_block_may_come_before_what_is_enforced(form: str) -> None:
    """Open where the prompt opens one, free to be opened where it says nothing, none where it stands closed or the turn goes on."""
    marks = REASONING_FORMATS[form]
    opened, free = (Block(marks.opening, marks.closing, is_open=is_open) for is_open in (True, False))
    found = [
        block_before(form, prompt, continued=None, is_turn_opened=True)
        for prompt in (f"assistant\n{marks.opening}\n", "assistant\n", f"assistant\n{marks.opening}\n\n{marks.closing}\n\n")
    ]
    if form == "gpt_oss":
        assert found == [None, None, None]
        return
    assert found == [opened, opened if marks.is_always_open else free, None]
    assert block_before(form, "assistant\nWell", continued="Well", is_turn_opened=False) is None
    assert block_before(form, "…", continued=f"{marks.opening}hm", is_turn_opened=False) == opened
    assert block_before(form, "user\nhi", continued=None, is_turn_opened=False) is None
    assert block_before("", "assistant\n", continued=None, is_turn_opened=True) is None
