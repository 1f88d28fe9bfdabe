"""Calls between special tokens: DeepSeek V3, V3.1 and R1, Kimi K2.

Each call is `<begin>header<separator>arguments<end>`. The header is the function's name (DeepSeek V3.1), "function" with the name
on a line of its own behind the separator and the arguments in a code fence (V3, R1), or an id that holds the name (Kimi K2).
"""

from __future__ import annotations

from dataclasses import dataclass

from services.detokenizer.parsers.characters import (
    SPACES,
    Source,
    Steps,
    copy_json_value,
    copy_until,
    match,
    read_while,
    skip_spaces,
)
from services.detokenizer.parsers.reading import Reading, ToolTypes


@dataclass(frozen=True, slots=True)
class _Markers:
    section_begin: str
    section_end: str
    call_begin: str
    separator: str
    call_end: str

    @property
    def all(self) -> tuple[str, ...]:
        """Every marker."""
        return self.section_begin, self.section_end, self.call_begin, self.separator, self.call_end


_DEEPSEEK = _Markers(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
)
_KIMI = _Markers(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
DEEPSEEK_MARKERS = _DEEPSEEK.all
KIMI_MARKERS = _KIMI.all


def read_deepseek_v3(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`function<sep>NAME` and a fence of JSON."""
    yield from _read_calls(source, reading, tools, _DEEPSEEK, is_fenced=True)


def read_deepseek_v31(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`NAME<sep>{…}`."""
    yield from _read_calls(source, reading, tools, _DEEPSEEK)


def read_kimi_k2(source: Source, reading: Reading, tools: ToolTypes) -> Steps[None]:
    """`functions.NAME:NUMBER<separator>{…}`; the header is the call's id, which the model wants to see again."""
    yield from _read_calls(source, reading, tools, _KIMI, has_ids=True)


def _read_calls(
    source: Source, reading: Reading, tools: ToolTypes, markers: _Markers, *, is_fenced: bool = False, has_ids: bool = False
) -> Steps[None]:
    while marker := (yield from copy_until(source, reading.text, markers.all)):
        if marker != markers.call_begin:
            # The section's own markers say nothing that the calls do not.
            continue
        spaces = yield from skip_spaces(source)
        header = yield from read_while(source, lambda char: char not in SPACES + "<")
        raw = marker + spaces + header + (yield from skip_spaces(source))
        if not (yield from match(source, markers.separator)):
            reading.text(raw)
            continue
        raw += markers.separator
        name = header
        if is_fenced:
            name = yield from read_while(source, lambda char: char not in SPACES + "<`{")
            raw += name + (yield from skip_spaces(source))
            if (yield from match(source, "```json")):
                raw += "```json"
        elif has_ids:
            name = header.removeprefix("functions.").rpartition(":")[0] or header.removeprefix("functions.")
        if not tools.knows(name):
            reading.text(raw)
            continue
        reading.begin_call(name, header if has_ids else "")
        yield from _read_arguments(source, reading, markers)


def _read_arguments(source: Source, reading: Reading, markers: _Markers) -> Steps[None]:
    """Pass arguments on up to the call's end; what stands between them and it, beside a fence, is text."""
    yield from skip_spaces(source)
    if (yield from match(source, "{")):
        source.put_back("{")
        if not (yield from copy_json_value(source, reading.arguments)):
            return
        yield from skip_spaces(source)
        yield from match(source, "```")
        yield from skip_spaces(source)
        if not (yield from match(source, markers.call_end)):
            return
    else:
        # A fence without anything in it holds no arguments.
        lead = "```" if (yield from match(source, "```")) else ""
        lead += yield from skip_spaces(source)

        def emit(text: str) -> None:
            nonlocal lead
            reading.arguments(lead + text)
            lead = ""

        if (yield from copy_until(source, emit, (markers.call_end, markers.section_end))):
            reading.end_call()
