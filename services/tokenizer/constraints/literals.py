"""Fixed and free text in a grammar's language, where special tokens are matched as the tokens that they are. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

ANY_TEXT: Final = r"(?s:.*)"


class Literals:
    """Writes texts for one vocabulary.

    Args:
        special_tokens: Ids of the model's special tokens by their texts. No text of a regular expression or a string matches them.
    """

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._ids = special_tokens
        self._special = re.compile("|".join(re.escape(text) for text in sorted(special_tokens, key=len, reverse=True)) or r"(?!)")

    def is_special(self, text: str) -> bool:
        """Whether a text is that of one special token."""
        return text in self._ids

    def split(self, text: str) -> tuple[str, str, str]:
        """What stands in a text before its first special token, that token's text, and what is behind it."""
        match = self._special.search(text)
        return (text[: match.start()], match.group(), text[match.end() :]) if match else (text, "", "")

    def write(self, text: str) -> str:
        """An expression for a text."""
        parts, start = [], 0
        for match in self._special.finditer(text):
            if match.start() > start:
                parts.append(quoted(text[start : match.start()]))
            parts.append(f"<[{self._ids[match.group()]}]>")
            start = match.end()
        if start < len(text):
            parts.append(quoted(text[start:]))
        return " ".join(parts)


def quoted(text: str) -> str:
    """A text without special tokens, as an expression."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """A text inside a regular expression between slashes."""
    return re.sub(r"[\\.+*?()|\[\]{}^$/]", r"\\\g<0>", text).replace("\n", r"\n")
