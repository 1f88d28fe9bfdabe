"""The special tokens of a model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from headrace.models.json_file import read_json_object
from headrace.models.model_config import TOKENIZER_FILE


def special_tokens_of(directory: Path) -> dict[str, int]:
    """Ids of the tokens that stand for no text, such as the end of a turn, by what the tokenizer calls them.

    Raises:
        ModelError: The file cannot be read.
    """
    added = read_json_object(directory / TOKENIZER_FILE).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {str(token["content"]): int(token["id"]) for token in tokens if token.get("special") and token.get("content")}
