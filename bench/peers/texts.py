"""Prompts of an exact number of tokens: random words, a growing chat, and work on a text that the answer repeats. Pure.

Tokens are counted by a function that is handed in, so nothing here knows a tokenizer. The same seed gives the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from bench.serve.prompts import WORDS

CountTokens = Callable[[str], int]

_FIT_ROUNDS_MAX = 40
# Long, plain modules that every Python has: real code and, in their docstrings, real English.
_SOURCE_MODULES = (
    "argparse", "calendar", "configparser", "csv", "dataclasses", "difflib", "fractions", "heapq", "logging", "mailbox", "optparse",
    "pathlib", "random", "shutil", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "zipfile",
)  # fmt: skip
_EDIT_ASK = "\n\n# The same code once more, unchanged but for the added type hints:\n\n"
_SUMMARY_ASK = "\n\nThe passages that matter most, quoted word for word:\n\n"
_LEAD_LINES = 3
"""Lines of the wanted answer that the prompt already holds, so that the model goes on with it."""
_FILLING_TOKENS_MIN = 2
_PROSE_WORDS_MIN = 5


def words_of(rng: random.Random, count: CountTokens, num_tokens: int, *, before: str = "", after: str = "") -> str:
    """Random words that together with `before` and `after` are exactly `num_tokens` tokens: `before + words + after`.

    Raises:
        ValueError: `before` and `after` leave no room, or the tokenizer does not count these words evenly enough.
    """
    words = [rng.choice(WORDS) for _ in range(max(1, num_tokens - count(before + after)))]
    for _ in range(_FIT_ROUNDS_MAX):
        text = before + " ".join(words) + after
        over = count(text) - num_tokens
        if over == 0:
            return text
        if over > 0:
            del words[max(0, len(words) - over) :]
        else:
            words += [rng.choice(WORDS) for _ in range(-over)]
        if not words:
            break
    raise ValueError(f"no prompt of {num_tokens} tokens in {_FIT_ROUNDS_MAX} tries: {count(before + after)} are fixed")


def chat_opening(rng: random.Random, count: CountTokens, num_tokens: int) -> str:
    """The first prompt of a conversation."""
    return words_of(
        rng, count, num_tokens, before="A conversation between a user and an assistant.\n\nUser: ", after="\nAssistant:"
    )


def chat_turn(rng: random.Random, count: CountTokens, num_tokens: int) -> str:
    """What a user adds after an answer."""
    return words_of(rng, count, num_tokens, before="\nUser: ", after="\nAssistant:")


def repeating_prompt(rng: random.Random, count: CountTokens, num_tokens: int, *, is_code: bool) -> str:
    """A text, an instruction to edit or quote it, and the first lines of the answer; a line of random words makes up the length."""
    lines = _source_lines() if is_code else _prose_lines()
    ask = _EDIT_ASK if is_code else _SUMMARY_ASK
    head = "# " if is_code else "Notes: "
    at = rng.randrange(len(lines))
    material = [lines[(at + offset) % len(lines)] for offset in range(num_tokens)]
    # Every line is a token at least, so this is too much; what fits is found by halving, as lengths only grow with lines.
    fits, too_many = 0, len(material)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if count(head + _with_ask(material[:middle], ask)) + _FILLING_TOKENS_MIN <= num_tokens:
            fits = middle
        else:
            too_many = middle
    if fits < _LEAD_LINES:
        raise ValueError(f"a prompt of {num_tokens} tokens holds no text to work on")
    return words_of(rng, count, num_tokens, before=head, after=_with_ask(material[:fits], ask))


def _with_ask(material: Sequence[str], ask: str) -> str:
    return "\n".join(["\n", *material]) + ask + "\n".join(material[:_LEAD_LINES]) + "\n"


@cache
def _source_lines() -> Sequence[str]:
    lines: list[str] = []
    for name in _SOURCE_MODULES:
        path = import_module(name).__file__
        assert path is not None, f"{name} is a module of the standard library, with a source file"
        lines += [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines


@cache
def _prose_lines() -> Sequence[str]:
    """Docstrings of these modules and of what they define, line by line."""
    lines: list[str] = []
    for name in _SOURCE_MODULES:
        module = import_module(name)
        documented = [module, *(value for value in vars(module).values() if getattr(value, "__module__", None) == name)]
        for value in documented:
            lines += [line.strip() for line in (getattr(value, "__doc__", None) or "").splitlines() if _is_prose(line)]
    return lines


def _is_prose(line: str) -> bool:
    return len(line.split()) >= _PROSE_WORDS_MIN and line.strip()[0].isalpha()


def repeated_share(prompt_ids: Sequence[int], output_ids: Sequence[int], *, lookup: int = 3) -> float:
    """How much of an output a reader of the text so far could have told in advance, 0 to 1.

    The share of output tokens that come where the last `lookup` tokens have been seen before, followed, the last time, by that very
    token. It is what drafts by prompt lookup can gain from a text.
    """
    ids = [*prompt_ids, *output_ids]
    followers: dict[tuple[int, ...], int] = {}
    num_told = 0
    for at in range(lookup, len(ids)):
        key = tuple(ids[at - lookup : at])
        if at >= len(prompt_ids):
            num_told += followers.get(key) == ids[at]
        followers[key] = ids[at]
    return num_told / len(output_ids) if output_ids else 0.0
