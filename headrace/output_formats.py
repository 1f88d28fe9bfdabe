"""Names of the ways in which models write reasoning and tool calls, and what of them two services must agree on.

The tokenizer chooses a model's formats from its chat template and sees whether a prompt ends inside a reasoning block; the
detokenizer reads them. Parsers stand in services/detokenizer/parsers, the choice in services/tokenizer/output_formats.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

TOOL_FORMATS: Final = (
    "deepseek_v3",
    "deepseek_v31",
    "glm",
    "gpt_oss",
    "granite",
    "hermes",
    "json",
    "kimi_k2",
    "llama3_json",
    "minimax",
    "mistral",
    "pythonic",
    "qwen3_coder",
)
"""`json` is a JSON array of calls and nothing else: what a grammar makes a model write when it must call."""
CHANNELS_FORMAT: Final = "gpt_oss"
"""Of tool calls and of reasoning: all of an output is messages in channels."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its reasoning.

    Attributes:
        opening: Begins a block.
        closing: Ends it.
        is_always_open: The output begins inside a block, whether the prompt shows that or not.
        budget_end: What is put behind reasoning whose budget is spent; empty where a block cannot be ended from outside.
    """

    opening: str
    closing: str
    is_always_open: bool = False
    budget_end: str = ""


_THINK = ReasoningFormat("<think>", "</think>", budget_end="\n</think>\n\n")
_OPEN_THINK = ReasoningFormat("<think>", "</think>", is_always_open=True, budget_end="\n</think>\n\n")

REASONING_FORMATS: Final[Mapping[str, ReasoningFormat]] = MappingProxyType(
    {
        "deepseek_r1": _OPEN_THINK,
        "glm": _THINK,
        # Channels, not blocks: the markers are those of a message in the channel "analysis".
        "gpt_oss": ReasoningFormat(
            "<|channel|>analysis<|message|>",
            "<|end|>",
            budget_end="<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        "kimi": ReasoningFormat("◁think▷", "◁/think▷", budget_end="◁/think▷"),
        "minimax": _OPEN_THINK,
        "nemotron_nano_v3": _THINK,
        "qwen3": _THINK,
        "qwen3_thinking": _OPEN_THINK,
    }
)
