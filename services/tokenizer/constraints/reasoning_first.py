"""Lets a model's block of reasoning stand before an output that must follow a grammar. Pure.

Whether a block is open where the output begins, may be opened there, or stands closed in the prompt is known when the prompt has
been rendered (`services/tokenizer/output_formats.py`). A block ends at its first closing mark: what follows is the output's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from services.tokenizer.constraints.literals import ANY_TEXT, Literals, escaped

SPACE: Final = r"/[ \n\r\t]{1,8}/"


@dataclass(frozen=True, slots=True)
class Block:
    """The block of reasoning that an output may begin with.

    Attributes:
        opening: The mark that begins it.
        closing: The mark that ends it.
        is_open: The output begins inside it; else the model is free to open one.
    """

    opening: str
    closing: str
    is_open: bool

    def excluded_start(self, literals: Literals) -> str:
        """A regular expression of what free text must not begin with, so that reasoning is not taken for it; empty for nothing."""
        is_told_apart = self.is_open or literals.is_special(self.opening)
        return "" if is_told_apart else rf"(?s:[ \n\r\t]*{escaped(self.opening)}.*)"


def with_reasoning(grammar: str, block: Block, literals: Literals) -> str:
    """A compiler's grammar with the block before it."""
    grammars: list[dict[str, Any]] = json.loads(grammar)["grammars"]
    output = {**grammars[0], "name": "output"}
    rules = ["%llguidance {}", f"R_SPACE: {SPACE}", f"R_TEXT: /{ANY_TEXT}/"]
    opening, closing = literals.write(block.opening), literals.write(block.closing)
    if literals.is_special(block.closing):
        rules.append(f"r_rest: R_TEXT {closing}")
    else:
        rules.append(f"r_rest[lazy]: R_TEXT {closing}")
    if block.is_open:
        rules.append("start: r_rest R_SPACE? @output")
    elif literals.is_special(block.opening):
        rules.append(f"start: (R_SPACE? {opening} r_rest R_SPACE?)? @output")
    elif literals.is_special(block.closing):
        rules += [rf"R_OPEN: /[ \n\r\t]{{0,8}}/ {opening}", "start: (R_OPEN r_rest R_SPACE?)? @output"]
    else:
        # One piece, or the free text behind it would compete for what the mark begins.
        rules += [rf"r_block[lazy]: /[ \n\r\t]{{0,8}}/ {opening} R_TEXT {closing}", "start: (r_block R_SPACE?)? @output"]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, output, *grammars[1:]]}, ensure_ascii=False)
